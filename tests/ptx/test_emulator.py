"""The emulator itself: small kernels whose results NumPy and PyTorch know, and kernels that are wrong on purpose."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from .emulator import Fault, emulated

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
ARCHITECTURES = pytest.mark.parametrize("arch", [80, 90, 100, 120])


@triton.jit
def dot_kernel(x, y, z, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(x + m[:, None] * K + k[None, :])
    b = tl.load(y + k[:, None] * N + n[None, :])
    tl.store(z + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def atomics_kernel(counts, largest, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_add(counts + i % 7, 1)
    tl.atomic_max(largest + i % 5, i)


@triton.jit
def scan_kernel(x, sums, sorted_, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(sums + i, tl.cumsum(v, 0))
    tl.store(sorted_ + i, tl.sort(v))


@triton.jit
def functions_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(y + i, tl.exp(v))
    tl.store(y + N + i, tl.log(tl.abs(v)))
    tl.store(y + 2 * N + i, tl.exp2(v))
    tl.store(y + 3 * N + i, tl.sqrt(tl.abs(v)))
    tl.store(y + 4 * N + i, tl.rsqrt(tl.abs(v)))
    tl.store(y + 5 * N + i, tl.floor(v))
    tl.store(y + 6 * N + i, tl.erf(v))
    tl.store(y + 7 * N + i, tl.sigmoid(v))


@triton.jit
def integers_kernel(x, y, z, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(z + i, a // b)
    tl.store(z + N + i, a % b)
    tl.store(z + 2 * N + i, tl.umulhi(a.to(tl.uint32), b.to(tl.uint32)).to(tl.int32))
    tl.store(z + 3 * N + i, tl.where(a > b, a << 3, a >> 2))


@triton.jit
def shift_kernel(x, y, n, by, step, REVERSE: tl.constexpr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(y + i + by, tl.load(x + i, mask=i < n), mask=i < n)
    if REVERSE:
        if BARRIER:
            tl.debug_barrier()
        tl.store(y + BLOCK - 1 - i, 2 * tl.load(y + BLOCK - 1 - i))


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def integers(*shape, low, high):
    generator = torch.Generator().manual_seed(low % 1000)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)


@ARCHITECTURES
@pytest.mark.parametrize("size", [(64, 64, 64), (128, 32, 64), (16, 16, 32)], ids=str)
@pytest.mark.parametrize(
    "dtype, precision, tolerance",
    [
        (torch.float16, "ieee", 1e-5),
        (torch.bfloat16, "ieee", 1e-5),
        (torch.float32, "tf32", 5e-2),
        (torch.float32, "tf32x3", 1e-4),
    ],
    ids=str,
)
def test_products(size, dtype, precision, tolerance, arch):
    M, N, K = size
    x, y, z = draw(M, K, dtype=dtype), draw(K, N, dtype=dtype), torch.empty(M, N)
    with emulated(arch):
        dot_kernel[(1,)](x, y, z, M, N, K, precision)
    torch.testing.assert_close(z.double(), x.double() @ y.double(), rtol=0, atol=tolerance)


@ARCHITECTURES
def test_atomics(arch):
    counts, largest, i = torch.zeros(7, dtype=torch.int32), torch.zeros(5, dtype=torch.int32), np.arange(256)
    with emulated(arch):
        atomics_kernel[(3,)](counts, largest, 256)
    assert counts.tolist() == (3 * np.bincount(i % 7)).tolist()
    assert largest.tolist() == [i[i % 5 == rest].max() for rest in range(5)]


@ARCHITECTURES
@pytest.mark.parametrize("n", [32, 256])
def test_scans_and_sorts(n, arch):
    x = integers(n, low=-99, high=99)
    sums, ordered = torch.empty_like(x), torch.empty_like(x)
    with emulated(arch):
        scan_kernel[(1,)](x, sums, ordered, n)
    assert torch.equal(sums.long(), x.cumsum(0)) and torch.equal(ordered, x.sort()[0])


@ARCHITECTURES
def test_functions(arch):
    x, y = 2 * draw(512), torch.empty(8, 512)
    with emulated(arch):
        functions_kernel[(1,)](x, y, 512)
    d = x.double()
    exact = (d.exp(), d.abs().log(), d.exp2(), d.abs().sqrt(), d.abs().rsqrt(), d.floor(), d.erf(), d.sigmoid())
    torch.testing.assert_close(y.double(), torch.stack(exact), rtol=1e-5, atol=1e-5)


@ARCHITECTURES
def test_integers(arch):
    x, y = integers(512, low=-(2**31), high=2**31 - 1), integers(512, low=1, high=99999)
    y *= integers(512, low=0, high=2) * 2 - 1
    z = torch.empty(4, 512, dtype=torch.int32)
    with emulated(arch):
        integers_kernel[(1,)](x, y, z, 512)
    a, b = x.numpy().astype(np.int64), y.numpy().astype(np.int64)
    high = [(p & 0xFFFFFFFF) * (q & 0xFFFFFFFF) >> 32 for p, q in zip(a.tolist(), b.tolist())]
    shifted = np.where(a > b, x.numpy() << 3, x.numpy() >> 2)
    exact = (np.trunc(a / b), np.fmod(a, b), np.array(high, np.uint32).view(np.int32), shifted)
    for ours, theirs in zip(z, exact):
        np.testing.assert_array_equal(ours, theirs)


@ARCHITECTURES
@pytest.mark.parametrize(
    "options, message",
    [
        ({"n": 300, "x": draw(100), "y": torch.zeros(400)}, "read of.*out of bounds|no argument"),
        ({"by": 1}, "write to.*(out of bounds|no argument)"),
        ({"by": -1}, "write to global memory|out of bounds"),
        ({"x": draw(64)[5:60], "n": 100}, "read of.*(in no argument's elements|out of bounds)"),
        ({"step": 64, "programs": 2, "y": torch.zeros(300)}, "another CTA"),
        ({"x": None}, "nobody wrote"),
        ({"reverse": True}, "race"),
        ({"programs": 0}, "a grid of"),
    ],
)
def test_faults(arch, options, message):
    settings = {"n": 128, "by": 0, "step": 128, "programs": 1, "reverse": False, "barrier": False} | options
    with emulated(arch), pytest.raises(Fault, match=message):
        shift(**settings)


@ARCHITECTURES
def test_no_fault(arch):
    with emulated(arch):
        y = shift(n=128, by=0, step=128, programs=1, reverse=True, barrier=True)
    assert torch.equal(y, 2 * draw(200)[:128])


def shift(n, by, step, programs, reverse, barrier, x=..., y=None):
    x = draw(200) if x is ... else torch.empty(128) if x is None else x
    y = torch.zeros(128) if y is None else y.clone()
    shift_kernel[(programs,)](x, y, n, by, step, reverse, barrier, 128)
    return y
