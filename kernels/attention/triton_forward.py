"""Attention forward, in one launch.

    S = Q Kᵀ · scale      lse_i = log Σ_j exp S_ij      O_i = Σ_j exp(S_ij - lse_i) V_j

It must read Q, K, V and write O once: 8 · tokens · head_dim bytes per head in half precision, and 4 · tokens for lse.
At 197 tokens and head_dim 64 that, and not the arithmetic, is the floor (1.2 MB per image and layer of ViT-B).

Two kernels, which compute BLOCK_M rows of O at a time and divide them once, at the end:

resident_kernel, where the keys of a head fit on chip: they lie there in TILES, powers of two chosen so that little is
computed for keys that do not exist (198 = 128 + 64 + 6 of 16), while a program walks over the rows of Q. The softmax is
that of the definition: all products, one maximum, one exponential of each.

streaming_kernel, for more keys: whole tiles of BLOCK_N pass by in a loop, then the rest in TILES, with the running
maximum and sum of FlashAttention (Dao et al. 2022, algorithm 1). Only the last tile is masked; without TILES (float32)
the loop takes all keys and masks each tile.

The numbers of queries and keys are ordinary integers: lengths that share TILES share one compiled kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.backend import architecture, column_parts, dot_precision, readable, strides
from fastdeit.kernels.tiles import LN_2, LOG2_E, dot_parts, dot_rows, load_parts, scale_parts, store_parts, zero_parts

from . import tiles


@triton.jit
def attend(q, k, v, row_max, row_sum, acc, scale_log2, cols, keys, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Adds one tile of keys. row_max is of the unscaled logits, so that scaling is part of the exponent's FMA."""
    s = dot_rows(q, k, None, PRECISION)
    if MASKED:
        s = tl.where(cols[None, :] < keys, s, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(s, 1))
    p = tl.exp2(s * scale_log2 - (new_max * scale_log2)[:, None])
    shrink = tl.exp2((row_max - new_max) * scale_log2)
    row_sum = row_sum * shrink + tl.sum(p, 1)
    acc = dot_parts(p.to(v[0].dtype), v, scale_parts(acc, shrink[:, None]), PRECISION)
    return new_max, row_sum, acc


@triton.jit
def store_output(
    out_ptr, lse_ptr, rows, row_max, row_sum, acc, scale_log2, heads, queries,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # By the reciprocal: a division of each element would be ten instructions more.
    store_parts(out_ptr, rows, heads * HEAD_DIM, acc, (1.0 / row_sum)[:, None], queries, HEAD_DIM, COLS)
    lse = (row_max * scale_log2 + tl.log2(row_sum)) * LN_2
    tl.store(lse_ptr + rows, lse, mask=rows < queries)


@triton.jit
def resident_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, scale, heads, queries, keys, splits,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr,
    TILES: tl.constexpr, STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`splits` programs share one head, side by side so that they find its K and V in L2."""
    item = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    b = (item // heads).to(tl.int64)
    h = item % heads
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    out_ptr += (b * queries * heads + h) * HEAD_DIM
    lse_ptr += item.to(tl.int64) * queries
    scale_log2 = tl.cast(scale, tl.float32) * LOG2_E
    LAST: tl.constexpr = len(TILES) - 1

    K = ()
    V = ()
    for i in tl.static_range(len(TILES)):
        cols = STARTS[i] + tl.arange(0, TILES[i])
        # Triton's tuples grow by addition only.
        K = K + (load_parts(k_ptr, cols, k_n, keys, HEAD_DIM, COLS, i == LAST),)  # noqa: RUF005
        V = V + (load_parts(v_ptr, cols, v_n, keys, HEAD_DIM, COLS, i == LAST),)  # noqa: RUF005

    for start in range(split * BLOCK_M, queries, splits * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = load_parts(q_ptr, rows, q_n, queries, HEAD_DIM, COLS, True)
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        S = ()
        for i in tl.static_range(len(TILES)):
            s = dot_rows(q, K[i], None, PRECISION)
            if i == LAST:
                s = tl.where((STARTS[i] + tl.arange(0, TILES[i]))[None, :] < keys, s, float("-inf"))
            row_max = tl.maximum(row_max, tl.max(s, 1))
            S = S + (s,)  # noqa: RUF005
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        acc = zero_parts(BLOCK_M, COLS)
        for i in tl.static_range(len(TILES)):
            p = tl.exp2(S[i] * scale_log2 - (row_max * scale_log2)[:, None])
            row_sum += tl.sum(p, 1)
            acc = dot_parts(p.to(q[0].dtype), V[i], acc, PRECISION)
        store_output(out_ptr, lse_ptr, rows, row_max, row_sum, acc, scale_log2, heads, queries, HEAD_DIM, COLS)


@triton.jit
def streaming_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, scale, heads, queries, keys, splits,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILES: tl.constexpr, STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of rows of one head; those of a head, `splits`, side by side so that they find its K and V in L2."""
    item = tl.program_id(0) // splits
    b = (item // heads).to(tl.int64)
    h = item % heads
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    scale_log2 = tl.cast(scale, tl.float32) * LOG2_E
    MASKED_LOOP: tl.constexpr = len(TILES) == 0
    LAST: tl.constexpr = len(TILES) - 1

    rows = tl.program_id(0) % splits * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_parts(q_ptr + b * q_b + h * q_h, rows, q_n, queries, HEAD_DIM, COLS, True)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = zero_parts(BLOCK_M, COLS)
    streamed = keys if MASKED_LOOP else (keys - 1) // BLOCK_N * BLOCK_N
    for first in range(0, streamed, BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        k = load_parts(k_ptr, cols, k_n, keys, HEAD_DIM, COLS, MASKED_LOOP)
        v = load_parts(v_ptr, cols, v_n, keys, HEAD_DIM, COLS, MASKED_LOOP)
        row_max, row_sum, acc = attend(q, k, v, row_max, row_sum, acc, scale_log2, cols, keys, MASKED_LOOP, PRECISION)
    for i in tl.static_range(len(TILES)):
        cols = streamed + STARTS[i] + tl.arange(0, TILES[i])
        k = load_parts(k_ptr, cols, k_n, keys, HEAD_DIM, COLS, i == LAST)
        v = load_parts(v_ptr, cols, v_n, keys, HEAD_DIM, COLS, i == LAST)
        row_max, row_sum, acc = attend(q, k, v, row_max, row_sum, acc, scale_log2, cols, keys, i == LAST, PRECISION)
    out_ptr += (b * queries * heads + h) * HEAD_DIM
    lse_ptr += item.to(tl.int64) * queries
    store_output(out_ptr, lse_ptr, rows, row_max, row_sum, acc, scale_log2, heads, queries, HEAD_DIM, COLS)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float):
    """Fills out (batch, queries, heads, head_dim) and lse (batch, heads, queries), both contiguous."""
    assert out.is_contiguous() and lse.is_contiguous()
    q, k, v = readable(q), readable(k), readable(v)
    (batch, queries, heads, head_dim), keys = q.shape, k.shape[1]
    config = tiles.forward(tiles.Shape(architecture(q), queries, keys, head_dim, q.dtype))
    static = config.tiles(keys)
    splits = config.splits(queries, batch * heads)
    kernel, block_n = (
        (resident_kernel, {}) if config.keys == "resident" else (streaming_kernel, {"BLOCK_N": config.block_n})
    )
    with torch.cuda.device_of(q):
        kernel[(batch * heads * splits,)](
            q, k, v, out, lse, scale, heads, queries, keys, splits,
            *strides(q, k, v),
            HEAD_DIM=head_dim, COLS=column_parts(head_dim), BLOCK_M=config.block_m, **block_n,
            TILES=static, STARTS=tuple(sum(static[:i]) for i in range(len(static))), PRECISION=dot_precision(q),
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg, enable_fp_fusion=True,
        )  # fmt: skip
