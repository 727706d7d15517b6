"""Reading and writing tiles of (tokens, head_dim) matrices whose rows lie `stride` elements apart."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(base, rows, stride, tokens, HEAD_DIM: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr):
    """Tile (len(rows), COLS). Columns past HEAD_DIM read as 0, and where MASKED the rows past the last token too."""
    cols = tl.arange(0, COLS)
    pointers = base + rows[:, None] * stride + cols[None, :]
    if MASKED and COLS != HEAD_DIM:
        tile = tl.load(pointers, mask=(rows[:, None] < tokens) & (cols[None, :] < HEAD_DIM), other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=rows[:, None] < tokens, other=0.0)
    elif COLS != HEAD_DIM:
        tile = tl.load(pointers, mask=cols[None, :] < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(base, rows, stride, tile, tokens, HEAD_DIM: tl.constexpr, COLS: tl.constexpr):
    """Writes the part of the tile that exists, in the dtype of `base`."""
    cols = tl.arange(0, COLS)
    mask = rows[:, None] < tokens
    if COLS != HEAD_DIM:
        mask = mask & (cols[None, :] < HEAD_DIM)
    tl.store(base + rows[:, None] * stride + cols[None, :], tile.to(base.dtype.element_ty), mask=mask)
