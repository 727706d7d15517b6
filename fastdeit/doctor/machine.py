"""What this machine is and what is installed, without importing any of it."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

PACKAGES = (
    "fastdeit", "torch", "triton", "torchvision", "timm", "xformers", "nvidia-dali-cuda130", "nvidia-dali-cuda120",
    "nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12", "nvidia-nvjpeg", "nvidia-nvjpeg-cu12", "nvidia-cudnn-cu13",
    "nvidia-nccl-cu13", "numpy", "pillow", "pyarrow", "transformers", "onnx", "onnxruntime", "tensorboard", "wandb",
    "trackio", "flash-attn", "flash-attn-3", "flash-attn-4",
)  # fmt: skip
DRIVER = Path("/proc/driver/nvidia")
SMI = ("name", "driver_version", "memory.total", "compute_mode", "mig.mode.current")


def facts() -> dict:
    return {
        "system": {
            "platform": platform.platform(),
            "python": f"{platform.python_version()} ({sys.executable})",
            "fastdeit": str(Path(__file__).parents[1]),
            "processor": processor(),
            "memory": memory(),
            "shared memory": _space("/dev/shm"),
            "disk here": _space(os.getcwd()),
            "C compiler": shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or "none",
        },
        "GPU": gpus(),
        "versions": versions(),
        "environment": {
            name: os.environ[name] for name in sorted(os.environ)
            if name.startswith(("CUDA_", "TORCH_", "TORCHINDUCTOR_", "TRITON_", "PYTORCH_", "NCCL_", "FASTDEIT_"))
            or name in ("LD_LIBRARY_PATH", "LD_PRELOAD", "OMP_NUM_THREADS", "PYTHONPATH")
        },
    }  # fmt: skip


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def gpus() -> list[dict[str, str]]:
    """What the driver knows of each GPU; [] where there is no driver. Some containers lack nvidia-smi."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return _named_by_the_driver()
    try:
        command = [tool, f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if said.returncode != 0:
        return []
    return [dict(zip(SMI, map(str.strip, line.split(",")))) for line in said.stdout.splitlines() if line.strip()]


def _named_by_the_driver() -> list[dict[str, str]]:
    said, found = "", []
    with suppress(OSError):
        said = (DRIVER / "version").read_text()
    version = next(iter(re.findall(r"\b\d+\.\d+[\d.]*", said)), "unknown")
    for file in sorted(DRIVER.glob("gpus/*/information")):
        lines = [line.partition(":") for line in file.read_text().splitlines()]
        name = next((value.strip() for key, _, value in lines if key == "Model"), "unknown")
        found.append({"name": name, "driver_version": version})
    return found


def processor() -> str:
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores for this process"


def memory() -> str:
    """The machine's, and the limit of the container where that is lower."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # cgroup 2; "max" is no number
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return f"{total / 2**30:.0f} GiB"


def _space(folder: str) -> str:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return "none"
    return f"{usage.free / 2**30:.0f} of {usage.total / 2**30:.0f} GiB free"
