"""mlp: one launch forward; backward one launch, two matrix products and a small sum.

    t = x W1ᵀ + b1      h = gelu(t)      y = h W2ᵀ + b2
    dh = dy W2          dt = dh gelu'(t)          dx = dt W1          db1 = sum over rows of dt
    dW1 = dtᵀ x         dW2 = dyᵀ h               db2 = sum over rows of dy

A program holds BLOCK_M rows of x and the sums of their y (backward: x and dy, and dx), and walks over the hidden width:
BLOCK_H columns of t, of h, and their share of y at a time. Forward, h stays in registers, where the second product
wants its first operand. Backward computes t again and writes h and dt once, for the products over rows that give dW1
and dW2, which are left to PyTorch's matrix product: a program of ours would have to compute t and dh a second time, or
read x and dy once for each slice of the hidden width, which is more than writing and reading h and dt.

Bytes that must move, M rows of width W, hidden width 4 W, in half precision, weights (16 W² bytes) in L2: forward
4 M W; backward 22 M W, and 20 M W for dW1 and dW2. In separate operators, which keep t: 36 M W and 72 M W.
Flop: forward 16 M W², backward 24 M W², and 16 M W² for dW1 and dW2; 8 M W² more than separate operators.

The width is taken in CHUNKs of 64 columns, because Triton's tiles have powers of two and 192 is none.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.backend import architecture
from fastdeit.kernels.gelu import gelu, gelu_and_derivative

CHUNK = 64
BLOCK_S = 16  # rows of a warp


class Tiles(NamedTuple):
    rows: int
    hidden: int = 32
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None


def forward_tiles(arch: int) -> Tiles:
    return Tiles(64, maxnreg=168 if 90 <= arch < 100 else None)  # three programs on a multiprocessor


def backward_tiles(arch: int) -> Tiles:
    """64 rows are what Hopper's and data-center Blackwell's matrix instructions want; elsewhere they spill."""
    return Tiles(64 if 90 <= arch < 120 else 32)


@triton.jit
def load_rows(ptr, row, rows, chunk, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Tile (len(row), CHUNK); rows past the last read as 0."""
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    return tl.load(ptr + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=row[:, None] < rows, other=0.0)


@triton.jit
def store_rows(ptr, row, rows, tile, chunk, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    pointers = ptr + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=row[:, None] < rows)


@triton.jit
def load_first_weight(ptr, hidden, chunk, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Of W1 (hidden, width): tile (len(hidden), CHUNK)."""
    return tl.load(ptr + hidden[:, None] * WIDTH + (chunk * CHUNK + tl.arange(0, CHUNK))[None, :])


@triton.jit
def load_second_weight(ptr, hidden, chunk, HIDDEN: tl.constexpr, CHUNK: tl.constexpr):
    """Of W2 (width, hidden): tile (CHUNK, len(hidden))."""
    return tl.load(ptr + (chunk * CHUNK + tl.arange(0, CHUNK))[:, None] * HIDDEN + hidden[None, :])


@triton.jit
def mlp_forward_kernel(
    x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, y_ptr, rows,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = WIDTH // CHUNK
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x = ()
    y = ()
    for c in tl.static_range(CHUNKS):  # Triton's tuples grow by addition only
        x = x + (load_rows(x_ptr, row, rows, c, WIDTH, CHUNK),)  # noqa: RUF005
        y = y + (tl.zeros((BLOCK_M, CHUNK), tl.float32),)  # noqa: RUF005
    for start in range(0, HIDDEN, BLOCK_H):
        hidden = start + tl.arange(0, BLOCK_H)
        t = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        for c in tl.static_range(CHUNKS):
            w1 = load_first_weight(w1_ptr, hidden, c, WIDTH, CHUNK)
            t = tl.dot(x[c], tl.trans(w1), t, input_precision="ieee")
        t += tl.load(b1_ptr + hidden).to(tl.float32)[None, :]
        h = gelu(t).to(x_ptr.dtype.element_ty)
        sums = ()
        for c in tl.static_range(CHUNKS):
            w2 = load_second_weight(w2_ptr, hidden, c, HIDDEN, CHUNK)
            sums = sums + (tl.dot(h, tl.trans(w2), y[c], input_precision="ieee"),)  # noqa: RUF005
        y = sums
    for c in tl.static_range(CHUNKS):
        b2 = tl.load(b2_ptr + c * CHUNK + tl.arange(0, CHUNK)).to(tl.float32)
        store_rows(y_ptr, row, rows, y[c] + b2[None, :], c, WIDTH, CHUNK)


@triton.jit
def mlp_backward_kernel(
    dy_ptr, x_ptr, w1_ptr, b1_ptr, w2_ptr, dx_ptr, h_ptr, dt_ptr, db1_ptr, rows,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """h, dt: (rows, HIDDEN). db1: of each BLOCK_S rows, a warp's, which need not pass through shared memory."""
    CHUNKS: tl.constexpr = WIDTH // CHUNK
    SUMS: tl.constexpr = BLOCK_M // BLOCK_S
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    sums_row = tl.program_id(0) * SUMS + tl.arange(0, SUMS)
    x = ()
    dy = ()
    dx = ()
    for c in tl.static_range(CHUNKS):
        x = x + (load_rows(x_ptr, row, rows, c, WIDTH, CHUNK),)  # noqa: RUF005
        dy = dy + (load_rows(dy_ptr, row, rows, c, WIDTH, CHUNK),)  # noqa: RUF005
        dx = dx + (tl.zeros((BLOCK_M, CHUNK), tl.float32),)  # noqa: RUF005
    for start in range(0, HIDDEN, BLOCK_H):
        hidden = start + tl.arange(0, BLOCK_H)
        t = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        dh = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        w1 = ()
        for c in tl.static_range(CHUNKS):
            w1 = w1 + (load_first_weight(w1_ptr, hidden, c, WIDTH, CHUNK),)  # noqa: RUF005
            t = tl.dot(x[c], tl.trans(w1[c]), t, input_precision="ieee")
        for c in tl.static_range(CHUNKS):
            w2 = load_second_weight(w2_ptr, hidden, c, HIDDEN, CHUNK)
            dh = tl.dot(dy[c], w2, dh, input_precision="ieee")
        t += tl.load(b1_ptr + hidden).to(tl.float32)[None, :]
        h, derivative = gelu_and_derivative(t)
        dt = dh * derivative
        pointers = row.to(tl.int64)[:, None] * HIDDEN + hidden[None, :]
        tl.store(h_ptr + pointers, h.to(h_ptr.dtype.element_ty), mask=row[:, None] < rows)
        tl.store(dt_ptr + pointers, dt.to(dt_ptr.dtype.element_ty), mask=row[:, None] < rows)
        db1 = tl.sum(tl.reshape(dt, (SUMS, BLOCK_S, BLOCK_H)), 1)
        tl.store(db1_ptr + sums_row[:, None] * HIDDEN + hidden[None, :], db1)
        sums = ()
        for c in tl.static_range(CHUNKS):
            sums = sums + (tl.dot(dt.to(w1[c].dtype), w1[c], dx[c], input_precision="ieee"),)  # noqa: RUF005
        dx = sums
    for c in tl.static_range(CHUNKS):
        store_rows(dx_ptr, row, rows, dx[c], c, WIDTH, CHUNK)


def mlp_triton(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    x, weight1, bias1, weight2, bias2 = (tensor.contiguous() for tensor in (x, weight1, bias1, weight2, bias2))
    y, rows = torch.empty_like(x), len(x)
    if rows == 0:
        return y
    block, launch = _launch(forward_tiles(architecture(x)), weight1)
    with torch.cuda.device_of(x):
        mlp_forward_kernel[(triton.cdiv(rows, block),)](x, weight1, bias1, weight2, bias2, y, rows, **launch)
    return y


def mlp_backward_triton(
    grad: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, x, weight1, bias1, weight2 = (tensor.contiguous() for tensor in (grad, x, weight1, bias1, weight2))
    dx, rows, hidden_width = torch.empty_like(x), len(x), len(weight1)
    hidden, d_hidden = (x.new_empty((rows, hidden_width)) for _ in range(2))
    if rows == 0:
        return dx, hidden, d_hidden, torch.zeros_like(bias1)
    block, launch = _launch(backward_tiles(architecture(x)), weight1)
    programs = triton.cdiv(rows, block)
    db1 = x.new_empty((programs * (block // BLOCK_S), hidden_width), dtype=torch.float32)
    with torch.cuda.device_of(x):
        mlp_backward_kernel[(programs,)](
            grad, x, weight1, bias1, weight2, dx, hidden, d_hidden, db1, rows, BLOCK_S=BLOCK_S, **launch
        )
    return dx, hidden, d_hidden, db1.sum(0).to(bias1.dtype)


def _launch(tiles: Tiles, weight1: Tensor) -> tuple[int, dict]:
    """Rows of a program, and what every launch is told."""
    hidden, width = weight1.shape
    return tiles.rows, {
        "WIDTH": width, "HIDDEN": hidden, "CHUNK": CHUNK, "BLOCK_M": tiles.rows, "BLOCK_H": tiles.hidden,
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "maxnreg": tiles.maxnreg,
        "enable_fp_fusion": True,
    }  # fmt: skip
