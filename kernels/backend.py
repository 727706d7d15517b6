"""Which implementation a tensor gets (Triton where it can run, else plain PyTorch), and what a launch asks of it."""

import os
from functools import cache

import torch
from torch import Tensor

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


def use_triton(tensor: Tensor) -> bool:
    """True for CUDA tensors, from Ampere on, and for CPU tensors when TRITON_INTERPRET=1, which raises RuntimeError
    where the interpreter cannot run."""
    if tensor.is_cuda:
        return _has_kernels(tensor.device)
    if _LACKING is not None:
        raise RuntimeError(_LACKING)
    return INTERPRETED


def _has_kernels(device: torch.device) -> bool:
    # AMD's GPUs call themselves CUDA devices, of another capability, and no kernel here was ever compiled for one. GPUs
    # before Ampere have 64 KB of shared memory, of which the kernels ask more, and Triton is not made for them.
    return device.type == "cuda" and torch.version.hip is None and compute_capability(device) >= 80


@torch.compiler.assume_constant_result
def left_to_pytorch(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's own operators should multiply: where no kernel of ours runs, and in float32 without TF32, which
    cannot use tensor cores, for which ours are made."""
    if device.type in ("cpu", "meta"):
        return False
    return not _has_kernels(device) or (dtype == torch.float32 and _precision(dtype) == "ieee")


def full_precision(tensor: Tensor) -> torch.autocast:
    """Around plain PyTorch in an operator, whose float32 products a caller's autocast would make half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype of autocast where that is on, as it casts what goes into PyTorch's own products."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype, floats = torch.get_autocast_dtype(device), (torch.float16, torch.bfloat16, torch.float32)
    return tuple(x.to(dtype) if x.dtype in floats else x for x in tensors)


def dot_precision(tensor: Tensor) -> str:
    """`input_precision` of tl.dot: float32 follows PyTorch's own switch, half precision has only one way."""
    return _precision(tensor.dtype)


def _precision(dtype: torch.dtype) -> str:
    # Not torch.get_float32_matmul_precision(), which raises once somebody has used the newer switches.
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


CPU_ARCHITECTURE = 90  # the interpreter runs what a Hopper GPU would


def architecture(x: Tensor) -> int:
    """80, 90, 100 and so on."""
    return compute_capability(x.device) if x.is_cuda else CPU_ARCHITECTURE


def padded_columns(head_dim: int) -> int:
    """Columns of a tile: the next power of two."""
    return 1 << (head_dim - 1).bit_length()


def column_parts(head_dim: int) -> tuple[int, ...]:
    """Columns of the tiles that hold head_dim: the next power of two, or its half and a smaller one beside it, of at
    least the 16 that a product takes, where these do: 80 is 64 + 16."""
    half = padded_columns(head_dim) // 2
    rest = max(16, padded_columns(head_dim - half))
    return (half, rest) if rest < half else (2 * half,)


def readable(x_BNHD: Tensor) -> Tensor:
    """x if the kernels can read it in place (contiguous head_dim, a batch entry within 2**31 elements), else a copy."""
    _, tokens, heads, head_dim = x_BNHD.shape
    _, stride_n, stride_h, stride_d = x_BNHD.stride()
    reach = (tokens + 256) * stride_n + heads * stride_h + head_dim
    return x_BNHD if stride_d == 1 and reach < 2**31 else x_BNHD.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Of batch, tokens and heads, for each; that of head_dim is 1."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]
