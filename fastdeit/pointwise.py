"""1x1 convolutions with a ReLU behind them as one matrix product, which in channels_last memory they are.

Bias and ReLU of a convolution are a pass of their own over its output, compiled or not; a matrix product takes both
along. In the plan that Inductor makes for RegNetY-16GF on an H200 the passes before are a fifth of all traffic.
"""

import copy

import torch
from torch import Tensor, nn

from .fold_batchnorm import chained

TOLERANCE = 0.05  # of the norm of the answers: half precision stays below, a ReLU in the wrong place does not


class PointwiseReLU(nn.Module):
    """relu(conv(images)) for images (batch, channels, height, width) in channels_last memory; so is the result."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        weight, bias = conv.weight.detach().flatten(1), conv.bias
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(weight.new_zeros(len(weight)) if bias is None else bias.detach(), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 2, 3, 1)
        products = torch._addmm_activation(self.bias, pixels.flatten(0, 2), self.weight.t())  # the activation is ReLU
        return products.unflatten(0, pixels.shape[:3]).permute(0, 3, 1, 2)


@torch.no_grad()
def join_pointwise(model: nn.Module, images: Tensor) -> tuple[nn.Module, int]:
    """A copy of `model` (frozen, in eval mode) in channels_last memory with such pairs joined, and how many they are.

    `images` (batch, 3, height, width) are any it can take. (the copy with none joined, 0) where there is none, or where
    the copy answers otherwise: a convolution whose output is also used before the ReLU only looks as if.
    """
    laid_out, images = model_in_channels_last(model), images.contiguous(memory_format=torch.channels_last)
    pairs = chained(laid_out, images, _is_pointwise, lambda module: type(module) is nn.ReLU)
    if not pairs:
        return laid_out, 0
    joined = copy.deepcopy(laid_out)
    for conv, relu in pairs:
        joined.set_submodule(conv, PointwiseReLU(joined.get_submodule(conv)))
        joined.set_submodule(relu, nn.Identity())
    expected, answers = laid_out(images).float(), joined(images).float()
    if not (answers - expected).norm() <= TOLERANCE * expected.norm():
        return laid_out, 0
    return joined, len(pairs)


def model_in_channels_last(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def _is_pointwise(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
    )
