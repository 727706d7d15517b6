"""BatchNorm folded into the convolution before it: what a frozen network need not compute.

    gamma * (conv(x, W) + b - mean) / sqrt(var + eps) + beta  ==  conv(x, s * W) + (b - mean) * s + beta
    where s = gamma / sqrt(var + eps)

Which BatchNorm follows which convolution is seen in one forward pass, not guessed from names, so any of timm's networks
will do. The folded network must answer as the given one did, or it is not used.
"""

import copy
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fastdeit.checkpoint import atomic
from fastdeit.distributed.world import World

TOLERANCE = (
    1e-4  # of the norm of the answers; float32 rounding through timm's deepest networks stays below a hundredth of it
)


@torch.no_grad()
def fold_batchnorm(model: nn.Module, images: Tensor) -> tuple[nn.Module, int]:
    """A copy of `model` (in eval mode) with its BatchNorms folded, and how many they are.

    `images` (batch, 3, height, width) are any it can take. (model itself, 0) where there is nothing to fold, or where
    the copy answers otherwise: a convolution whose output is also used without the BatchNorm only looks foldable.
    """
    folded = copy.deepcopy(model)
    pairs = chained(folded, images, _is_plain_conv, _is_batchnorm)
    if not pairs:
        return model, 0
    for conv, norm in pairs:
        _fold(folded, conv, norm)
    expected, answers = model(images), folded(images)
    if not (answers - expected).norm() <= TOLERANCE * expected.norm():
        return model, 0
    return folded, len(pairs)


def chained(
    model: nn.Module, images: Tensor, is_first: Callable[[nn.Module], bool], is_second: Callable[[nn.Module], bool]
) -> list[tuple[str, str]]:
    """Names of (first, second) where the one's output was the other's input as `model` ran, each called once.

    Not in inference mode, where tensors do not know whether something has changed them in between.
    """
    outputs: dict[int, tuple[str, Tensor, int]] = {}  # by id; holding the tensors keeps the ids apart
    pairs, calls, hooks = [], Counter(), []

    def after_first(name):
        def hook(module, inputs, output):
            calls[name] += 1
            outputs[id(output)] = (name, output, output._version)

        return hook

    def before_second(name):
        def hook(module, inputs):
            calls[name] += 1
            first, _, version = outputs.get(id(inputs[0]), (None, None, None))
            if version == inputs[0]._version:
                pairs.append((first, name))

        return hook

    for name, module in model.named_modules():
        if is_first(module):
            hooks.append(module.register_forward_hook(after_first(name)))
        elif is_second(module):
            hooks.append(module.register_forward_pre_hook(before_second(name)))
    model(images)
    for hook in hooks:
        hook.remove()
    return [(first, second) for first, second in pairs if calls[first] == calls[second] == 1]


def _is_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d) and module.running_mean is not None


def _is_plain_conv(module: nn.Module) -> bool:
    # Subclasses may do something to the weight in forward (weight standardisation); timm's Conv2dSame only pads.
    return type(module) is nn.Conv2d or type(module).__name__ == "Conv2dSame"


def _fold(model: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    # timm's BatchNormAct2d holds the activation too.
    activation = getattr(norm, "act", None)
    model.set_submodule(norm_name, activation if isinstance(activation, nn.Module) else nn.Identity())


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


FORMATS = {  # of the images
    "contiguous": torch.contiguous_format, "channels_last": torch.channels_last, "joined": torch.channels_last,
}  # fmt: skip


ROUNDS, FORWARDS = 3, 5  # the formats take turns, so that a machine that slows down slows both


def choose(model: nn.Module, name: str, images: Tensor, world: World, remembered: Path | None = None) -> str:
    """The fastest of FORMATS for `model` on `images`, both on the device and of the same dtype.

    Measured by rank 0 for all. Remembered in a file by GPU, PyTorch, model `name`, dtype and shape, because a resumed
    run should compute as it did before. `remembered`: that file; by default in ~/.cache/fastdeit (XDG_CACHE_HOME).
    """
    if not world.is_main:
        return world.broadcast(None)
    file = (
        remembered or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastdeit/memory_formats.json"
    )
    device = torch.cuda.get_device_name(images.device) if images.is_cuda else "cpu"
    key = f"{device}, torch {torch.__version__}, {name}, {images.dtype}, {'x'.join(map(str, images.shape))}"
    known = _read(file)
    if known.get(key) not in FORMATS:
        seconds = measure(model, images)
        known[key] = min(seconds, key=seconds.get)
        _write(file, known)
    return world.broadcast(known[key])


def laid_out(model: nn.Module, name: str, images: Tensor) -> nn.Module:
    """A copy of `model` in one of FORMATS. images: a few that it can take."""
    if name == "joined":
        return join_pointwise(model, images)[0]
    return copy.deepcopy(model).to(memory_format=FORMATS[name])


@torch.no_grad()
def measure(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Seconds of the fastest forward pass in each format."""
    copies = {name: laid_out(model, name, images[:2]) for name in FORMATS}
    seconds = dict.fromkeys(FORMATS, float("inf"))
    for _ in range(ROUNDS):
        for name, network in copies.items():
            given = images.contiguous(memory_format=FORMATS[name])
            network(given)  # the first pass in a format may choose algorithms
            for _ in range(FORWARDS):
                seconds[name] = min(seconds[name], _seconds(network, given))
    return seconds


def _seconds(model: nn.Module, images: Tensor) -> float:
    _wait(images)
    start = time.perf_counter()
    model(images)
    _wait(images)
    return time.perf_counter() - start


def _wait(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _write(file: Path, known: dict) -> None:
    with suppress(OSError):  # a home that cannot be written to: measured again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.replace_json(file, known)
