"""Tiles of (tokens, head_dim) matrices, for the kernels of the attention operations.

A tile has a power of two of columns. In `parts`, a tuple of one tile or two side by side, head_dim 80 is 64 + 16
columns rather than 128: a product over head_dim is then the sum of two, one with (.., head_dim) is two.
"""

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


# Parts. PARTS: the columns of each; Triton's tuples grow by addition only.


@triton.constexpr_function
def columns_of(dim, parts, i):
    """How many columns of part i exist."""
    return min(parts[i], dim - i * parts[0])


@triton.jit
def load_parts(base, rows, stride, tokens, DIM: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(PARTS)):
        tile = load_rows(base + i * PARTS[0], rows, stride, tokens, columns_of(DIM, PARTS, i), PARTS[i], MASKED)
        tiles = tiles + (tile,)  # noqa: RUF005
    return tiles


@triton.jit
def store_parts(base, rows, stride, tiles, factor, tokens, DIM: tl.constexpr, PARTS: tl.constexpr):
    """tiles · factor, which is a number or has a row for each of theirs."""
    for i in tl.static_range(len(PARTS)):
        tile = tiles[i] * factor
        store_rows(base + i * PARTS[0], rows, stride, tile, tokens, columns_of(DIM, PARTS, i), PARTS[i])


@triton.jit
def zeros(ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.zeros((ROWS, COLS), tl.float32)


@triton.jit
def zero_parts(ROWS: tl.constexpr, PARTS: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(PARTS)):
        tiles = tiles + (zeros(ROWS, PARTS[i]),)  # noqa: RUF005
    return tiles


@triton.jit
def dot_rows(x, y, acc, PRECISION: tl.constexpr):
    """acc + x yᵀ of two matrices in parts; acc None: 0."""
    for i in tl.static_range(len(x)):
        acc = tl.dot(x[i], tl.trans(y[i]), acc, input_precision=PRECISION)
    return acc


@triton.jit
def dot_parts(x, y, acc, PRECISION: tl.constexpr):
    """acc + x y, y and acc in parts."""
    sums = ()
    for i in tl.static_range(len(y)):
        sums = sums + (tl.dot(x, y[i], acc[i], input_precision=PRECISION),)  # noqa: RUF005
    return sums


@triton.jit
def scale_parts(tiles, factor):
    scaled = ()
    for i in tl.static_range(len(tiles)):
        scaled = scaled + (tiles[i] * factor,)  # noqa: RUF005
    return scaled


@triton.jit
def sum_of_products(x, y):
    """Of each row of x ∘ y, in float32."""
    total = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(x)):
        total += tl.sum(x[i].to(tl.float32) * y[i].to(tl.float32), 1)
    return total
