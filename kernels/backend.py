"""Which implementation a tensor gets: Triton where it can run, plain PyTorch elsewhere."""

import os

import torch

# Triton reads this variable when it is imported and then runs every kernel on the CPU, as NumPy.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(tensor: torch.Tensor) -> bool:
    """True for CUDA tensors, and for CPU tensors when TRITON_INTERPRET=1."""
    return tensor.is_cuda or INTERPRETED
