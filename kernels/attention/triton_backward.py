"""Attention backward: one launch at the sizes of vision transformers, two beyond.

    P = exp(S · scale - lse)      dV = Pᵀ dO      dP = dO Vᵀ      delta_i = Σ_d O_id dO_id - dlse_i
    dS = P ∘ (dP - delta)         dQ = dS K · scale               dK = dSᵀ Q · scale

It must read Q, K, V, O, dO and write dQ, dK, dV once: 16 · tokens · head_dim bytes per head in half precision.

key_block holds K, V and the sums of dK, dV for KV_ROWS keys, and walks over the queries. It works with Sᵀ (keys ×
queries) so that Pᵀ and dSᵀ are in registers where wgmma wants the first operand of dV = Pᵀ dO and dK = dSᵀ Q; with
dQᵀ = Kᵀ dSᵀ, so that no product has fewer than 64 rows even with 32 queries at a time. The accumulator of Sᵀ starts at
-inf for keys that do not exist, which masks them at no cost; lse comes with the scale, as one FMA after the product,
behind which its load is hidden.

backward_kernel, the one launch: a program takes a head and goes through its blocks of keys. Where one block holds all
keys (198 tokens), each dQ is final at once; else dQ is summed in a float32 scratch of its own, 4 · tokens · head_dim
bytes, which mostly stays in the L2 cache. No atomics, no second pass, no separate kernel for delta, which with lse is
first left where key_block finds it in the layout of Sᵀ's columns.

backward_q_kernel and backward_kv_kernel, the two launches: for long sequences, and where there are too few heads to
keep every multiprocessor busy. The first computes dQ with one program per block of queries and leaves delta for the
second, which has one program per block of keys; S and dP are computed in both. Sums are in a fixed order everywhere.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.backend import architecture, dot_precision, readable, strides
from fastdeit.kernels.tiles import (
    LOG2_E,
    dot_parts,
    dot_rows,
    load_parts,
    store_parts,
    store_rows,
    sum_of_products,
    zero_parts,
)

from . import tiles


@triton.jit
def row_statistics(
    out_ptr, grad_out, lse_ptr, grad_lse_ptr, rows_ptr, padded, rows, stride, queries,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """lse in base 2 and delta, inf and 0 past the last query, which it leaves in rows_ptr, (2, padded), too."""
    out = load_parts(out_ptr, rows, stride, queries, HEAD_DIM, COLS, True)
    delta = sum_of_products(out, grad_out)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + rows, mask=rows < queries, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=rows < queries, other=float("inf")) * LOG2_E
    tl.store(rows_ptr + rows, lse)
    tl.store(rows_ptr + padded + rows, delta)
    return lse, delta


@triton.jit
def key_block(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, rows_ptr, dq_sum_ptr, dq_ptr, dk_ptr, dv_ptr,
    block, scale, heads, queries, keys, padded, q_n, k_n, v_n, d_n,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr, KV_ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys. With BLOCKS of them in a program dQ too: final after the last one. Then head_dim
    is one tile, whose columns are the rows of dQᵀ."""
    scale_log2 = scale * LOG2_E
    cols = block * KV_ROWS + tl.arange(0, KV_ROWS)
    k = load_parts(k_ptr, cols, k_n, keys, HEAD_DIM, COLS, True)
    v = load_parts(v_ptr, cols, v_n, keys, HEAD_DIM, COLS, True)
    key_bias = tl.where(cols < keys, 0.0, float("-inf"))  # else exp(0 - lse), perhaps inf, for keys that do not exist
    dk = zero_parts(KV_ROWS, COLS)
    dv = zero_parts(KV_ROWS, COLS)
    for start in range(0, queries, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = load_parts(q_ptr, rows, q_n, queries, HEAD_DIM, COLS, True)
        grad_out = load_parts(grad_out_ptr, rows, heads * HEAD_DIM, queries, HEAD_DIM, COLS, True)
        lse = tl.load(rows_ptr + rows)
        delta = tl.load(rows_ptr + padded + rows)

        masked = tl.broadcast_to(key_bias[:, None], (KV_ROWS, BLOCK_M))
        s_t = dot_rows(k, q, masked, PRECISION)
        p_t = tl.exp2(s_t * scale_log2 - lse[None, :])
        dp_t = dot_rows(v, grad_out, None, PRECISION)
        ds_t = (p_t * (dp_t - delta[None, :])).to(q[0].dtype)
        dv = dot_parts(p_t.to(q[0].dtype), grad_out, dv, PRECISION)
        dk = dot_parts(ds_t, q, dk, PRECISION)
        if BLOCKS == 1:
            dq_t = tl.dot(tl.trans(k[0]), ds_t, input_precision=PRECISION)
            store_rows(dq_ptr, rows, d_n, tl.trans(dq_t * scale), queries, HEAD_DIM, COLS[0])
        elif BLOCKS > 1:
            # A tile of the sum lies as the product leaves it: coalesced, and mostly read by the threads that wrote it.
            sums = dq_sum_ptr + start * COLS[0]
            sums = sums + tl.arange(0, COLS[0])[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
            dq_t = tl.load(sums, mask=(block > 0) & (rows < queries)[None, :], other=0.0)
            dq_t = tl.dot(tl.trans(k[0]), ds_t, dq_t, input_precision=PRECISION)
            if block < BLOCKS - 1:
                tl.store(sums, dq_t)
            else:
                store_rows(dq_ptr, rows, d_n, tl.trans(dq_t * scale), queries, HEAD_DIM, COLS[0])
    store_parts(dk_ptr, cols, d_n, dk, scale, keys, HEAD_DIM, COLS)
    store_parts(dv_ptr, cols, d_n, dv, 1.0, keys, HEAD_DIM, COLS)


@triton.jit
def backward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_out_ptr, lse_ptr, grad_lse_ptr, rows_ptr, dq_sum_ptr, dq_ptr, dk_ptr, dv_ptr,
    scale, heads, queries, keys, padded,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, dq_b, dk_b, d_n, d_h,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr, KV_ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All three gradients of one (batch, head) item."""
    item = tl.program_id(0)
    b, h, item = (item // heads).to(tl.int64), item % heads, item.to(tl.int64)
    query_offset = (b * queries * heads + h) * HEAD_DIM
    scale = tl.cast(scale, tl.float32)
    grad_out_ptr += query_offset
    rows_ptr += item * 2 * padded
    if grad_lse_ptr is not None:
        grad_lse_ptr += item * queries
    for start in range(0, padded, KV_ROWS):
        rows = start + tl.arange(0, KV_ROWS)
        grad_out = load_parts(grad_out_ptr, rows, heads * HEAD_DIM, queries, HEAD_DIM, COLS, True)
        row_statistics(
            out_ptr + query_offset, grad_out, lse_ptr + item * queries, grad_lse_ptr,
            rows_ptr, padded, rows, heads * HEAD_DIM, queries, HEAD_DIM, COLS,
        )  # fmt: skip
    if BLOCKS > 1:
        dq_sum_ptr += item * padded * COLS[0]
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    dq_ptr += b * dq_b + h * d_h
    dk_ptr += b * dk_b + h * d_h
    dv_ptr += b * dk_b + h * d_h
    tl.debug_barrier()  # other threads of this program read what these wrote
    if BLOCKS == 1:  # without the loop, for whose counters the 198-token configuration has no register left
        key_block(
            q_ptr, k_ptr, v_ptr, grad_out_ptr, rows_ptr, None, dq_ptr, dk_ptr, dv_ptr,
            0, scale, heads, queries, keys, padded, q_n, k_n, v_n, d_n, HEAD_DIM, COLS, KV_ROWS, BLOCK_M, 1, PRECISION,
        )  # fmt: skip
    else:
        for block in range(BLOCKS):
            key_block(
                q_ptr, k_ptr, v_ptr, grad_out_ptr, rows_ptr, dq_sum_ptr, dq_ptr, dk_ptr, dv_ptr,
                block, scale, heads, queries, keys, padded, q_n, k_n, v_n, d_n,
                HEAD_DIM, COLS, KV_ROWS, BLOCK_M, BLOCKS, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()


@triton.jit
def backward_kv_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, rows_ptr, dk_ptr, dv_ptr,
    scale, heads, queries, keys, splits, padded,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, dq_b, dk_b, d_n, d_h,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr, KV_ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of KV_ROWS keys, after backward_q. `splits` blocks of keys."""
    item = tl.program_id(0) // splits
    b, h, item = (item // heads).to(tl.int64), item % heads, item.to(tl.int64)
    key_block(
        q_ptr + b * q_b + h * q_h, k_ptr + b * k_b + h * k_h, v_ptr + b * v_b + h * v_h,
        grad_out_ptr + (b * queries * heads + h) * HEAD_DIM, rows_ptr + item * 2 * padded, None,
        None, dk_ptr + b * dk_b + h * d_h, dv_ptr + b * dk_b + h * d_h,
        tl.program_id(0) % splits, tl.cast(scale, tl.float32), heads, queries, keys, padded, q_n, k_n, v_n, d_n,
        HEAD_DIM, COLS, KV_ROWS, BLOCK_M, 0, PRECISION,
    )  # fmt: skip


@triton.jit
def backward_q_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_out_ptr, lse_ptr, grad_lse_ptr, rows_ptr, dq_ptr,
    scale, heads, queries, keys, splits, padded,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, dq_b, dk_b, d_n, d_h,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries, and their statistics for backward_kv. `splits` blocks of queries."""
    item = tl.program_id(0) // splits
    b, h, item = (item // heads).to(tl.int64), item % heads, item.to(tl.int64)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    query_offset = (b * queries * heads + h) * HEAD_DIM
    scale = tl.cast(scale, tl.float32)

    rows = tl.program_id(0) % splits * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_parts(q_ptr + b * q_b + h * q_h, rows, q_n, queries, HEAD_DIM, COLS, True)
    grad_out = load_parts(grad_out_ptr + query_offset, rows, heads * HEAD_DIM, queries, HEAD_DIM, COLS, True)
    if grad_lse_ptr is not None:
        grad_lse_ptr += item * queries
    lse, delta = row_statistics(
        out_ptr + query_offset, grad_out, lse_ptr + item * queries, grad_lse_ptr,
        rows_ptr + item * 2 * padded, padded, rows, heads * HEAD_DIM, queries, HEAD_DIM, COLS,
    )  # fmt: skip

    dq = zero_parts(BLOCK_M, COLS)
    for start in range(0, keys, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = load_parts(k_ptr, cols, k_n, keys, HEAD_DIM, COLS, True)
        v = load_parts(v_ptr, cols, v_n, keys, HEAD_DIM, COLS, True)
        s = dot_rows(q, k, None, PRECISION)
        p = tl.exp2(s * (scale * LOG2_E) - lse[:, None])
        p = tl.where(cols[None, :] < keys, p, 0.0)
        dp = dot_rows(grad_out, v, None, PRECISION)
        ds = (p * (dp - delta[:, None])).to(q[0].dtype)
        dq = dot_parts(ds, k, dq, PRECISION)
    store_parts(dq_ptr + b * dq_b + h * d_h, rows, d_n, dq, scale, queries, HEAD_DIM, COLS)


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    grad_lse: Tensor | None, grads: Sequence[Tensor],
):  # fmt: skip
    """Fills grads = (dq, dk, dv): three contiguous tensors, or the three parts of a packed gradient."""
    dq, dk, dv = grads
    assert dq.stride()[1:] == dk.stride()[1:] and dk.stride() == dv.stride() and dq.stride(-1) == 1
    assert out.is_contiguous() and lse.is_contiguous()
    q, k, v, grad_out = readable(q), readable(k), readable(v), grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    (batch, queries, heads, head_dim), keys = q.shape, k.shape[1]
    shape = tiles.Shape(architecture(q), queries, keys, head_dim, q.dtype)
    one, by_query, by_key = config = tiles.backward(shape, batch * heads)
    columns = tiles.backward_columns(config, head_dim)
    steps = *strides(q, k, v), dq.stride(0), *dk.stride()[:3]
    shared = {"HEAD_DIM": head_dim, "COLS": columns, "PRECISION": dot_precision(q), "enable_fp_fusion": True}

    def scratch(*shape: int) -> Tensor:
        return torch.empty((batch * heads, *shape), dtype=torch.float32, device=q.device)

    with torch.cuda.device_of(q):
        if one is not None:
            blocks = triton.cdiv(keys, one.keys)
            padded = triton.cdiv(queries, one.keys) * one.keys
            assert one.keys % one.queries == 0
            backward_kernel[(batch * heads,)](
                q, k, v, out, grad_out, lse, grad_lse, scratch(2, padded),
                scratch(padded, columns[0]) if blocks > 1 else None, dq, dk, dv,
                scale, heads, queries, keys, padded, *steps,
                KV_ROWS=one.keys, BLOCK_M=one.queries, BLOCKS=blocks,
                num_warps=one.num_warps, num_stages=one.num_stages, maxnreg=one.maxnreg, **shared,
            )  # fmt: skip
            return
        query_blocks, key_blocks = triton.cdiv(queries, by_query.queries), triton.cdiv(keys, by_key.keys)
        padded = query_blocks * by_query.queries
        assert by_query.queries % by_key.queries == 0  # backward_kv reads no statistics past the padding
        rows = scratch(2, padded)
        backward_q_kernel[(batch * heads * query_blocks,)](
            q, k, v, out, grad_out, lse, grad_lse, rows, dq,
            scale, heads, queries, keys, query_blocks, padded, *steps,
            BLOCK_M=by_query.queries, BLOCK_N=by_query.keys,
            num_warps=by_query.num_warps, num_stages=by_query.num_stages, maxnreg=by_query.maxnreg, **shared,
        )  # fmt: skip
        backward_kv_kernel[(batch * heads * key_blocks,)](
            q, k, v, grad_out, rows, dk, dv, scale, heads, queries, keys, key_blocks, padded, *steps,
            KV_ROWS=by_key.keys, BLOCK_M=by_key.queries,
            num_warps=by_key.num_warps, num_stages=by_key.num_stages, maxnreg=by_key.maxnreg, **shared,
        )  # fmt: skip
