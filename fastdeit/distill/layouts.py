"""The memory layout in which a frozen network runs fastest, measured once and remembered.

- contiguous, channels_last: neither always wins. For RegNetY's grouped convolutions channels_last was 2.5 times
  slower in PyTorch 2.1 and 6 % faster in 2.4 (timm's published benchmarks).
- joined: channels_last, and each 1x1 convolution with the ReLU behind it as one matrix product, whose epilogue takes
  bias and ReLU along. As a pass of their own over the output they are a fifth of all traffic in the code that Inductor
  generates for RegNetY-16GF on an H200.
"""

import copy
import json
import os
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdeit.checkpoint import atomic
from fastdeit.distributed.world import World

from .folding import chained

# Memory format of the images in each layout.
FORMATS = {
    "contiguous": torch.contiguous_format, "channels_last": torch.channels_last, "joined": torch.channels_last,
}  # fmt: skip
ROUNDS, FORWARDS = 3, 5  # the layouts take turns, so that a machine that slows down slows all of them
TOLERANCE = 0.05  # of the norm of the logits: half precision stays below it, a misplaced ReLU does not


def choose(model: nn.Module, name: str, images: Tensor, world: World, file: Path | None = None) -> str:
    """The fastest of FORMATS for `model` on `images`, both on the device and of the same dtype.

    Measured by rank 0 for all. Kept in `file` by GPU, PyTorch, model `name`, dtype and shape, because a resumed run
    should compute as it did before. Default: ~/.cache/fastdeit/memory_formats.json (XDG_CACHE_HOME).
    """
    if not world.is_main:
        return world.broadcast(None)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    file = file or caches / "fastdeit/memory_formats.json"
    device = torch.cuda.get_device_name(images.device) if images.is_cuda else "cpu"
    key = f"{device}, torch {torch.__version__}, {name}, {images.dtype}, {'x'.join(map(str, images.shape))}"
    known = _read(file)
    if known.get(key) not in FORMATS:
        seconds = measure(model, images)
        known[key] = min(seconds, key=seconds.get)
        _write(file, known)
    return world.broadcast(known[key])


def laid_out(model: nn.Module, name: str, images: Tensor) -> nn.Module:
    """A copy of `model` in one of FORMATS. images: a few that it accepts."""
    if name == "joined":
        return join_pointwise(model, images)[0]
    return copy.deepcopy(model).to(memory_format=FORMATS[name])


@torch.no_grad()
def measure(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Seconds of the fastest forward pass in each layout."""
    copies = {name: laid_out(model, name, images[:2]) for name in FORMATS}
    seconds = dict.fromkeys(FORMATS, float("inf"))
    for _ in range(ROUNDS):
        for name, network in copies.items():
            given = images.contiguous(memory_format=FORMATS[name])
            network(given)  # the first pass may choose algorithms
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
    with suppress(OSError):  # a read-only home directory: measured again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.replace_json(file, known)


# ---------------------------------------------------------------------------------------------------------------------
# 1x1 convolution and ReLU as one matrix product


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
    """A copy of `model` (frozen, in eval mode) in channels_last memory with 1x1 convolutions and ReLUs joined, and
    the number of pairs.

    `images` (batch, 3, height, width): any it accepts. (the copy with none joined, 0) where there is no pair, or where
    the joined copy's logits differ: a convolution whose output is also used before the ReLU only looks like a pair.
    """
    plain, images = laid_out(model, "channels_last", images), images.contiguous(memory_format=torch.channels_last)
    pairs = chained(plain, images, _is_pointwise, lambda module: type(module) is nn.ReLU)
    if not pairs:
        return plain, 0
    joined = copy.deepcopy(plain)
    for conv, relu in pairs:
        joined.set_submodule(conv, PointwiseReLU(joined.get_submodule(conv)))
        joined.set_submodule(relu, nn.Identity())
    expected, logits = plain(images).float(), joined(images).float()
    if not (logits - expected).norm() <= TOLERANCE * expected.norm():
        return plain, 0
    return joined, len(pairs)


def _is_pointwise(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
    )
