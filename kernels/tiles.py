"""Tiles of (tokens, head_dim) matrices, for the kernels of both attention operations."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(base, rows, stride, tokens, DIM: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr, first=0):
    """Tile (len(rows), COLS), from column `first` on, of a matrix whose rows lie `stride` elements apart. Columns past
    DIM read as 0, and where MASKED the rows past the last token too."""
    cols = first + tl.arange(0, COLS)
    pointers = base + rows[:, None] * stride + cols[None, :]
    if MASKED and DIM % COLS != 0:
        tile = tl.load(pointers, mask=(rows[:, None] < tokens) & (cols[None, :] < DIM), other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=rows[:, None] < tokens, other=0.0)
    elif DIM % COLS != 0:
        tile = tl.load(pointers, mask=cols[None, :] < DIM, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(base, rows, stride, tile, tokens, DIM: tl.constexpr, COLS: tl.constexpr, first=0):
    """Writes the part of the tile that exists, in the dtype of `base`."""
    cols = first + tl.arange(0, COLS)
    mask = rows[:, None] < tokens
    if DIM % COLS != 0:
        mask = mask & (cols[None, :] < DIM)
    tl.store(base + rows[:, None] * stride + cols[None, :], tile.to(base.dtype.element_ty), mask=mask)
