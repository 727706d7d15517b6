"""The ways in which a frozen convolutional network can be laid out; which is fastest, tuning decides (teacher.py).

- plain: weights as they are loaded (contiguous), images as they come (channels_last).
- contiguous, channels_last: weights and images; neither always wins. For RegNetY's grouped convolutions channels_last
  was 2.5 times slower in PyTorch 2.1 and 6 % faster in 2.4 (timm's published benchmarks).
- joined: channels_last, and each 1x1 convolution with the ReLU behind it as one matrix product, whose epilogue takes
  bias and ReLU along. As a pass of their own over the output they are a fifth of all traffic in the code that Inductor
  generates for RegNetY-16GF on an H200.
- fused: channels_last, and any convolution with the ReLU behind it as cuDNN's operator for both (conv_relu.py), on a
  GPU only.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .conv_relu import ConvReLU
from .folding import chained

# Memory format of the images in each layout.
FORMATS = {
    "plain": torch.preserve_format, "contiguous": torch.contiguous_format, "channels_last": torch.channels_last,
    "joined": torch.channels_last, "fused": torch.channels_last,
}  # fmt: skip
TOLERANCE = 0.05  # of the norm of the logits: half precision stays below it, a misplaced ReLU does not


def available(model: nn.Module, device: torch.device, *, compiled: bool) -> list[str]:
    """Those to choose among, "plain" first."""
    if sum(isinstance(module, nn.Conv2d) for module in model.modules()) < 2:  # a transformer
        return ["plain"]
    without = set() if device.type == "cuda" and torch.version.hip is None else {"fused"}
    if compiled:  # Inductor lays out what is contiguous itself
        without.add("contiguous")
    return [name for name in FORMATS if name not in without]


def is_merged(model: nn.Module) -> bool:
    """Whether `laid_out` has made something of "joined" or "fused"."""
    return any(isinstance(module, (PointwiseReLU, ConvReLU)) for module in model.modules())


def laid_out(model: nn.Module, name: str, images: Tensor) -> nn.Module:
    """A copy of `model` in one of FORMATS. images: a few that it accepts."""
    if name == "joined":
        return join_pointwise(model, images)[0]
    if name == "fused":
        return fuse_relu(model, images)[0]
    return copy.deepcopy(model).to(memory_format=FORMATS[name])


def join_pointwise(model: nn.Module, images: Tensor) -> tuple[nn.Module, int]:
    """A copy of `model` (frozen, in eval mode) in channels_last memory with 1x1 convolutions and ReLUs joined, and
    the number of pairs: see `_merged`."""
    return _merged(model, images, _is_pointwise, PointwiseReLU)


def fuse_relu(model: nn.Module, images: Tensor) -> tuple[nn.Module, int]:
    """The same with any convolution, each pair as one operator of cuDNN's."""
    return _merged(model, images, lambda module: type(module) is nn.Conv2d and module.padding_mode == "zeros", ConvReLU)


@torch.no_grad()
def _merged(
    model: nn.Module, images: Tensor, is_conv: Callable[[nn.Module], bool], merge: Callable[[nn.Conv2d], nn.Module]
) -> tuple[nn.Module, int]:
    """images (batch, 3, height, width): any the model accepts. (the copy with none merged, 0) where there is no pair,
    or where the merged copy's logits differ: a convolution whose output is also used before the ReLU only looks like a
    pair."""
    plain, images = laid_out(model, "channels_last", images), images.contiguous(memory_format=torch.channels_last)
    pairs = chained(plain, images, is_conv, lambda module: type(module) is nn.ReLU)
    if not pairs:
        return plain, 0
    merged = copy.deepcopy(plain)
    for conv, relu in pairs:
        merged.set_submodule(conv, merge(merged.get_submodule(conv)))
        merged.set_submodule(relu, nn.Identity())
    expected, logits = plain(images).float(), merged(images).float()
    if not (logits - expected).norm() <= TOLERANCE * expected.norm():
        return plain, 0
    return merged, len(pairs)


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


def _is_pointwise(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
    )
