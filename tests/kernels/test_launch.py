"""Launches as Triton's JIT makes them of real arguments, compiled for GPUs that are not here, and not run.

test_compile.py compiles kernels as benchmarks/compile_cases.py describes them. Here the operators themselves are
called, on CPU tensors, with a driver that says it is a GPU: the launch binds and specialises its arguments (an integer
that is 1 becomes a constant, one of 2**31 and more is 64 bits wide, a pointer or stride is a multiple of 16 or not),
and what it compiles must fit the GPU it was compiled for.
"""

import math
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from fastdeit import kernels
from fastdeit.kernels import backend

if backend.INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastdeit.kernels.attention import configs, triton_backward, triton_forward

SHARED_KILOBYTES = {80: 163, 86: 99, 90: 227, 120: 99}  # a thread block may have; 89 is as 86
HALF, FLOAT = torch.bfloat16, torch.float32


class Driver:
    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self):
        return 1000 + self.arch  # Triton caches kernels by device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiled_for(arch: int, full_gpu: bool = False):
    """Operators on CPU tensors launch their Triton kernels, which are compiled and left at that. Yields the list of
    (kernel's name, type of each argument)."""
    run, launches = JITFunction.run, []

    def compile_only(kernel, *arguments, grid, warmup, **options):
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        launches.append((kernel.fn.__name__, compiled.src.signature))
        assert compiled.metadata.shared <= SHARED_KILOBYTES[arch] * 1024
        assert all(1 <= n <= limit for n, limit in zip(grid, (2**31 - 1, 65535, 65535))) and math.prod(grid) < 2**31

    with (
        patch.object(triton.runtime.driver, "_active", Driver(arch)),
        patch.object(JITFunction, "run", compile_only),
        patch.object(backend, "INTERPRETED", True),
        patch.object(triton_forward, "architecture", lambda x: arch),
        patch.object(triton_backward, "architecture", lambda x: arch),
        patch.object(configs, "FULL_GPU", 1 if full_gpu else 264),
    ):
        yield launches
    assert launches


def attention(qkv, through_lse=True):
    out, lse = torch.ops.fastdeit.attention_qkvpacked(qkv, 0.1)
    torch.ops.fastdeit.attention_qkvpacked_backward(out, qkv, out, lse, 0.1, lse if through_lse else None)


@pytest.mark.parametrize("arch, full_gpu", [(86, False), (86, True), (90, True), (120, False)])
@pytest.mark.parametrize("tokens, head_dim", [(198, 64), (300, 80)])
def test_attention(tokens, head_dim, arch, full_gpu):
    with compiled_for(arch, full_gpu):
        attention(torch.empty(2, tokens, 3, 2, head_dim, dtype=HALF))


def test_attention_in_tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with compiled_for(86):
            attention(torch.empty(1, 65, 3, 2, 128, dtype=FLOAT))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", [HALF, FLOAT], ids=str)
def test_attention_of_one_token_and_head(dtype):
    with compiled_for(90) as launches:
        attention(torch.empty(1, 1, 3, 1, 64, dtype=dtype), through_lse=False)
    for _, types in launches:
        assert types["heads"] == types["queries"] == types["keys"] == "constexpr"


@pytest.mark.parametrize("full_gpu", [False, True])
@pytest.mark.parametrize("queries, keys", [(1, 197), (300, 1)])
def test_attention_of_one_query_or_key(queries, keys, full_gpu):
    q, k = torch.empty(2, queries, 1, 88, dtype=HALF), torch.empty(2, keys, 1, 88, dtype=HALF)
    with compiled_for(90, full_gpu):
        out, lse = torch.ops.fastdeit.attention(q, k, k, 0.1)
        torch.ops.fastdeit.attention_backward(out, q, k, k, out, lse, 0.1, None)


def test_attention_of_pointers_and_strides_that_are_multiples_of_nothing():
    with compiled_for(90, full_gpu=True):
        attention(torch.empty(2, 71, 3, 3, 35 + 64, dtype=HALF)[1:, 1:, :, 1:, 35:])


def test_attention_with_strides_beyond_32_bits():
    k = torch.empty(2**31 + 2**14, dtype=HALF).as_strided((2, 17, 1, 64), (2**31 + 64, 64, 64, 1))
    with compiled_for(90) as launches:
        out, lse = torch.ops.fastdeit.attention(k, k, k, 0.1)
        torch.ops.fastdeit.attention_backward(out, k, k, k, out, lse, 0.1, None)
    for _, types in launches:
        assert types["q_b"] == types["k_b"] == types["v_b"] == "i64" and types["k_n"] == "i32"


@pytest.mark.parametrize("options", [{}, {"objective": "mse"}], ids=str)
@pytest.mark.parametrize("tokens, heads, dim, teacher_dim, arch", [(70, 2, 128, 96, 86), (1, 1, 32, 160, 90)])
def test_attention_distillation_loss(tokens, heads, dim, teacher_dim, arch, options):
    student = torch.empty(2, tokens, 2, heads, dim, dtype=HALF, requires_grad=True)
    teacher = torch.empty(2, tokens, 2, heads, teacher_dim, dtype=FLOAT if arch == 90 else HALF)
    with compiled_for(arch):
        kernels.attention_distillation_loss(*student.unbind(2), *teacher.unbind(2), **options).backward()


@pytest.mark.parametrize("batch, classes, stored", [(1, 1, 1), (1, 17, 1), (3, 21843, 5)])
def test_distillation_loss(batch, classes, stored):
    logits, labels = (torch.zeros(batch, classes, dtype=HALF, requires_grad=True) for _ in range(2)), torch.zeros(batch)
    teacher = torch.zeros(batch, stored, dtype=torch.int64), torch.zeros(batch, stored)
    with compiled_for(90):
        mix = labels.long(), labels
        kernels.distillation_loss(*logits, labels.long(), teacher, kind="soft", smoothing=0.1, mix=mix).backward()


@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 4096)], ids=str)
def test_pointwise(shape):
    x, residual, vector = (torch.zeros(n, dtype=HALF, requires_grad=True) for n in (shape, shape, shape[-1]))
    factors = {"layer_scale": vector, "drop_path_scale": torch.zeros(shape[0])}
    with compiled_for(90):
        sum(y.sum() for y in kernels.add_layer_norm(x, residual, vector, vector, **factors)).backward()
        kernels.bias_gelu(x, vector).sum().backward()


@pytest.mark.parametrize("arch", [86, 90, 120])
@pytest.mark.parametrize("rows, width, hidden", [(1, 64, 64), (198, 192, 768)])
def test_mlp(rows, width, hidden, arch, monkeypatch):
    monkeypatch.setattr(backend, "CPU_ARCHITECTURE", arch)
    shapes = (rows, width), (hidden, width), (hidden,), (width, hidden), (width,)
    with compiled_for(arch) as launches:
        kernels.mlp(*(torch.zeros(shape, dtype=HALF, requires_grad=True) for shape in shapes)).sum().backward()
    assert [name for name, _ in launches] == ["mlp_forward_kernel", "mlp_backward_kernel"]


def test_more_numbers_than_32_bits_count():
    with compiled_for(90) as launches:
        torch.ops.fastdeit.bias_gelu(torch.empty(2**20, 2**11, dtype=HALF), torch.empty(2**11, dtype=HALF))
    assert launches[0][1]["numel"] == "i64"


def test_mix_normalize_of_one_pixel():
    images, one = torch.zeros(1, 1, 1, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    box = torch.zeros(1, 4, dtype=torch.int32)
    draws = {"partner": one, "lam": one.float(), "box": box, "erase_box": box, "erase_seed": one}
    with compiled_for(90):
        kernels.mix_normalize(images, (0.5,) * 3, (0.5,) * 3, **draws)
