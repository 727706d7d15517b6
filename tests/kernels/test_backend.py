import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastdeit.kernels import backend


@pytest.mark.parametrize("capability, expected", [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 1), True)])
def test_gpus_before_ampere_take_plain_pytorch(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    backend.compute_capability.cache_clear()
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    assert backend.use_triton(tensor) is expected
    backend.compute_capability.cache_clear()


def test_amd_gpus_take_plain_pytorch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.3")
    backend.compute_capability.cache_clear()
    assert not backend.use_triton(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0)))
    assert backend.left_to_pytorch(torch.device("cuda", 0), torch.bfloat16)
    backend.compute_capability.cache_clear()


def test_head_dim_is_held_by_one_tile_or_two():
    """Powers of two from 16 on, side by side, with the second where that leaves out a quarter of one tile or more."""
    parts = {head_dim: backend.column_parts(head_dim) for head_dim in range(16, 129, 8)}
    for head_dim, columns in parts.items():
        assert all(n >= 16 and n & (n - 1) == 0 for n in columns) and len(columns) <= 2
        assert sum(columns[:-1]) < head_dim <= sum(columns) <= backend.padded_columns(head_dim)
    assert parts[40] == parts[48] == (32, 16) and parts[72] == parts[80] == (64, 16)
    assert parts[88] == parts[96] == (64, 32)
    assert parts[24] == (32,) and parts[56] == parts[64] == (64,) and parts[104] == parts[128] == (128,)


@pytest.mark.parametrize(
    "device, dtype, tf32, expected",
    [
        ("cuda", torch.float32, False, True),
        ("cuda", torch.float32, True, False),
        ("cuda", torch.bfloat16, False, False),
        ("mps", torch.float16, False, True),
        ("cpu", torch.float32, False, False),
        ("meta", torch.float32, False, False),
    ],
)
def test_what_is_left_to_pytorch(device, dtype, tf32, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    backend.compute_capability.cache_clear()
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        assert backend.left_to_pytorch(torch.device(device), dtype) is expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
        backend.compute_capability.cache_clear()


def test_cpu_tensors_take_triton_in_the_interpreter_alone(monkeypatch):
    for interpreted in (False, True):
        monkeypatch.setattr(backend, "INTERPRETED", interpreted)
        assert backend.use_triton(torch.zeros(1)) is interpreted


@pytest.mark.parametrize(
    "triton, numpy, runs",
    [("3.6.0", "2.4.0", False), ("3.6.0", "2.3.5", True), ("3.7.0+git1", "2.5.2", True), ("3.9.0", "2.4.6", True)],
)
def test_old_interpreters_need_an_old_numpy(triton, numpy, runs, monkeypatch):
    monkeypatch.setattr("triton.__version__", triton)
    monkeypatch.setattr("numpy.__version__", numpy)
    lacking = backend.interpreter_lacks()
    assert lacking is None if runs else "Triton 3.6.0 needs an older NumPy: pip install 'numpy<2.4'" in lacking


def test_an_interpreter_that_cannot_run_says_so_when_a_kernel_is_called():
    program = """
import os, numpy, triton
os.environ["TRITON_INTERPRET"] = "1"
triton.__version__, numpy.__version__ = "3.6.0", "2.5.2"
import torch
from fastdeit.kernels import bias_gelu
try:
    bias_gelu(torch.ones(2, 4), torch.zeros(4))
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'numpy<2.4'" in done.stdout
