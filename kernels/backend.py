"""Which implementation a tensor gets: Triton where it can run, plain PyTorch elsewhere."""

import os

import torch

# Triton reads this variable when it is imported and then runs every kernel on the CPU, as NumPy.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(tensor: torch.Tensor) -> bool:
    """True for CUDA tensors, and for CPU tensors when TRITON_INTERPRET=1."""
    return tensor.is_cuda or INTERPRETED


def dot_precision(tensor: torch.Tensor) -> str:
    """`input_precision` of tl.dot: float32 follows PyTorch's own switch, half precision has only one way."""
    # Not torch.get_float32_matmul_precision(), which raises once somebody has used the newer switches.
    tf32 = tensor.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
