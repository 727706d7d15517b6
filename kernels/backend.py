"""Which implementation a tensor gets: Triton where it can run, plain PyTorch elsewhere."""

import os
from functools import cache

import torch

# Triton reads this variable when it is imported and then runs every kernel on the CPU, as NumPy.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def interpreter_lacks() -> str | None:
    """What Triton's interpreter lacks here, in a sentence; None where it can run."""
    import numpy
    import triton

    old, new = (tuple(map(int, package.__version__.split(".")[:2])) for package in (triton, numpy))
    if old < (3, 7) and new >= (2, 4):  # a NumPy that no longer takes an array of one element for a number
        return f"the interpreter of Triton {triton.__version__} needs an older NumPy: pip install 'numpy<2.4'"
    return None


_LACKING = interpreter_lacks() if INTERPRETED else None


@cache
def compute_capability(device: torch.device) -> int:
    """80, 90, 100 and so on."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def use_triton(tensor: torch.Tensor) -> bool:
    """True for CUDA tensors, from Ampere on, and for CPU tensors when TRITON_INTERPRET=1, which raises RuntimeError
    where the interpreter cannot run."""
    if tensor.is_cuda:
        # Older GPUs have 64 KB of shared memory, of which the kernels ask more, and Triton is not made for them.
        return compute_capability(tensor.device) >= 80
    if _LACKING is not None:
        raise RuntimeError(_LACKING)
    return INTERPRETED


def full_precision(tensor: torch.Tensor) -> torch.autocast:
    """Around plain PyTorch in an operator, whose float32 products a caller's autocast would make half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def dot_precision(tensor: torch.Tensor) -> str:
    """`input_precision` of tl.dot: float32 follows PyTorch's own switch, half precision has only one way."""
    # Not torch.get_float32_matmul_precision(), which raises once somebody has used the newer switches.
    tf32 = tensor.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
