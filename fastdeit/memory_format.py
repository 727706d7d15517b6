"""Contiguous or channels_last: which of the two a network runs faster in, measured and remembered.

Neither wins everywhere: for RegNetY's grouped convolutions channels_last was 2.5 x slower in PyTorch 2.1 and 6 % faster
in 2.4 (timm's results).
"""

import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from .distributed import Place

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ROUNDS, FORWARDS = 3, 5  # the formats take turns, so that a machine that slows down slows both


def choose(model: nn.Module, name: str, images: Tensor, place: Place, remembered: Path | None = None) -> str:
    """The faster of FORMATS for `model` on `images`, both on the device and of the same dtype.

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


@torch.inference_mode()
def measure(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Seconds of the fastest forward pass in each format. The model is left in the last one."""
    seconds = dict.fromkeys(FORMATS, float("inf"))
    for _ in range(ROUNDS):
        for name, memory_format in FORMATS.items():
            model.to(memory_format=memory_format)
            laid_out = images.contiguous(memory_format=memory_format)
            model(laid_out)  # the first pass in a format may choose algorithms
            for _ in range(FORWARDS):
                seconds[name] = min(seconds[name], _seconds(model, laid_out))
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
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(known, indent=1))
        unfinished.replace(file)
    except OSError:
        pass  # a home that cannot be written to: measured again next time
