"""What the kernels of this operation share: tiles of scores, and the shape of a launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import dot_precision

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(ptr, index, stride, count, start, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """Tokens `index` by dimensions [start, start + CHUNK); what lies outside (count, DIM) reads as 0."""
    d = start + tl.arange(0, CHUNK)
    mask = (index[:, None] < count) & (d[None, :] < DIM)
    return tl.load(ptr + index[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, tile, index, stride, count, start, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """The part of the tile that exists, in the dtype of `ptr`."""
    d = start + tl.arange(0, CHUNK)
    mask = (index[:, None] < count) & (d[None, :] < DIM)
    tl.store(ptr + index[:, None] * stride + d[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def scores(
    x_ptr, y_ptr, x, y, x_stride, y_stride, X, Y, DIM: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Tile x y^T, float32, unscaled."""
    tile = tl.zeros((x.shape[0], y.shape[0]), tl.float32)
    for start in range(0, DIM, CHUNK):
        x_tile = load_tile(x_ptr, x, x_stride, X, start, DIM, CHUNK)
        y_tile = load_tile(y_ptr, y, y_stride, Y, start, DIM, CHUNK)
        tile = tl.dot(x_tile, tl.trans(y_tile), tile, input_precision=PRECISION)
    return tile


def block(x: Tensor) -> int:
    """Tokens of x taken at a time."""
    return max(16, min(triton.next_power_of_2(x.shape[1]), 32 if x.dtype == torch.float32 else 64))


def chunk(x: Tensor) -> int:
    """Dimensions of x taken at a time: a power of two, and in half precision all of a usual head."""
    return max(16, min(triton.next_power_of_2(x.shape[3]), 32 if x.dtype == torch.float32 else 128))


def chunks(x: Tensor) -> int:
    return triton.cdiv(x.shape[3], chunk(x))


def launch_options(student: Tensor, teacher: Tensor) -> dict:
    """What every launch of two models' kernels says of their head_dims, dtype and warps."""
    chunk_s, chunk_t = chunk(student), chunk(teacher)
    return {
        "DIM_S": student.shape[3], "DIM_T": teacher.shape[3], "CHUNK_S": chunk_s, "CHUNK_T": chunk_t,
        "PRECISION": dot_precision(student), "num_warps": 8 if max(chunk_s, chunk_t) > 64 else 4,
        "enable_fp_fusion": True,
    }  # fmt: skip


def readable(x: Tensor) -> Tensor:
    """x (batch, tokens, heads, head_dim), copied only if an image of it spans more than 32-bit offsets reach."""
    span = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:]))
    return x if span < 2**30 else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Of batch, tokens and heads, for each; that of head_dim is 1."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]
