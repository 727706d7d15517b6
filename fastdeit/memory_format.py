"""Contiguous, channels_last, or that with its 1x1 convolutions joined: how a network runs fastest, measured and
remembered.

None wins everywhere: for RegNetY's grouped convolutions channels_last was 2.5 x slower in PyTorch 2.1 and 6 % faster
in 2.4 (timm's results).
"""

import copy
import json
import os
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from . import durable
from .distributed import Place
from .pointwise import join_pointwise

FORMATS = {  # of the images
    "contiguous": torch.contiguous_format, "channels_last": torch.channels_last, "joined": torch.channels_last,
}  # fmt: skip
ROUNDS, FORWARDS = 3, 5  # the formats take turns, so that a machine that slows down slows both


def choose(model: nn.Module, name: str, images: Tensor, place: Place, remembered: Path | None = None) -> str:
    """The fastest of FORMATS for `model` on `images`, both on the device and of the same dtype.

    Measured by rank 0 for all. Remembered in a file by GPU, PyTorch, model `name`, dtype and shape, because a resumed
    run should compute as it did before. `remembered`: that file; by default in ~/.cache/fastdeit (XDG_CACHE_HOME).
    """
    if not place.is_main:
        return place.broadcast(None)
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
    return place.broadcast(known[key])


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
        durable.replace_json(file, known)
