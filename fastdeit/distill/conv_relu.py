"""relu(conv(images)) of a frozen network as cuDNN's operator for both, in channels_last memory.

Inductor does not know PyTorch's cudnn_convolution_relu; as an operator of ours, with a fake, it is compiled around. On
the CPU the operator is a convolution and a ReLU.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvReLU(nn.Module):
    """relu(conv(images)), (batch, channels, height, width) to the same; the result is in channels_last memory."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        padding = conv.padding
        if isinstance(padding, str):  # "same" pads as much on either side only where the window is odd
            assert padding == "valid" or all(side % 2 for side in conv.kernel_size)
            reach = [(side - 1) // 2 * step for side, step in zip(conv.kernel_size, conv.dilation)]
            padding = (0, 0) if padding == "valid" else tuple(reach)
        weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
        bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
        self.shape = (list(conv.stride), list(padding), list(conv.dilation), conv.groups)

    def forward(self, images: Tensor) -> Tensor:
        return _conv_relu(images, self.weight, self.bias, *self.shape)


@torch.library.custom_op("fastdeit::conv_relu", mutates_args=())
def _conv_relu(
    images: Tensor, weight: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    images = images.contiguous(memory_format=torch.channels_last)
    if images.is_cuda:
        result = torch.ops.aten.cudnn_convolution_relu(images, weight, bias, stride, padding, dilation, groups)
    else:
        result = F.conv2d(images, weight, bias, stride, padding, dilation, groups).relu()
    return result.contiguous(memory_format=torch.channels_last)


@_conv_relu.register_fake
def _(images, weight, bias, stride, padding, dilation, groups):
    made = F.conv2d(images, weight, bias, stride, padding, dilation, groups)
    return torch.empty_like(made, memory_format=torch.channels_last)
