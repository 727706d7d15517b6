"""Where choices are remembered: on this machine for later runs, and what they depend on.

$XDG_CACHE_HOME/fastdeit/tuning.json (~/.cache where that is not set): {key: choice}, the key in words.
"""

import importlib.metadata
import json
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from fastdeit.checkpoint import atomic

FORM = 1  # of the file; another one is not read


def default_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastdeit" / "tuning.json"


def circumstances(device: torch.device) -> dict[str, str]:
    """The machine and the versions that a choice depends on, in words."""
    here = {"torch": torch.__version__, "triton": _version("triton"), "fastdeit": _version("fastdeit")}
    if device.type != "cuda":
        return {"device": _processor(), **here}
    cudnn = str(torch.backends.cudnn.version())
    return {"device": torch.cuda.get_device_name(device), "driver": _driver(), **here, "cuDNN": cudnn}


def read(file: Path) -> dict:
    """{} where the file is not there, cannot be read, or is of another form: then all is measured again."""
    try:
        content = json.loads(file.read_text())
        return content["choices"] if content["form"] == FORM and isinstance(content["choices"], dict) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def add(file: Path, key: str, choice: dict) -> None:
    """Of two processes that write at the same time, one's choice may be lost, and is measured again."""
    with suppress(OSError):  # a read-only home directory
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.replace_json(file, {"form": FORM, "choices": read(file) | {key: choice}})


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return "unknown"


@cache
def _processor() -> str:
    name = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU {name or torch.backends.cpu.get_cpu_capability()}, {cores} cores"
