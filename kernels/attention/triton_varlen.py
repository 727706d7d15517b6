"""Attention of sequences packed one after another: the formulas of reference.py, within each sequence.

A sequence is told by its place in cu_seqlens, of queries and of keys, which only the kernels read. The launch knows how
many sequences there are and how long the longest should be, and makes that many blocks for each; one of a shorter
sequence has nothing to do, and where a sequence is longer than said each of its blocks takes every blocks-th tile. What
cu_seqlens says beyond the tokens there are is cut off, so that nothing else in memory is touched. Queries without keys
are left as they are: the launch gets zeros to fill, and an lse of -inf.

Forward: a program a block of queries. Backward: one a block of queries (dQ, and the rowsums), then one a block of keys
(dK and dV). No atomics: each run gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.backend import readable
from fastdeit.kernels.tiles import (
    LN_2,
    LOG2_E,
    dot_parts,
    dot_rows,
    load_parts,
    scale_parts,
    store_parts,
    sum_of_products,
    zero_parts,
)

from .triton_bias import BY_KEY, launch_options


@triton.jit
def place(cu_q_ptr, cu_k_ptr, blocks, heads, total_q, total_k):
    """Of this program: its block, its head; the sequence's first query and number of queries, 0 where there is no key;
    its first key and number of keys."""
    item = tl.program_id(0) // blocks
    b = item // heads
    first_q, queries = between(cu_q_ptr + b, total_q)
    first_k, keys = between(cu_k_ptr + b, total_k)
    queries = tl.where(keys > 0, queries, 0)
    return tl.program_id(0) % blocks, (item % heads).to(tl.int64), first_q, queries, first_k, keys


@triton.jit
def between(cu_ptr, total):
    first = tl.minimum(tl.maximum(tl.load(cu_ptr), 0), total)
    last = tl.maximum(tl.minimum(tl.load(cu_ptr + 1), total), first)
    return first.to(tl.int64), last - first


@triton.jit
def varlen_forward_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, out_ptr, lse_ptr, scale, heads, total_q, total_k, blocks,
    q_n, q_h, k_n, k_h, v_n, v_h,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    block, h, first_q, queries, first_k, keys = place(cu_q_ptr, cu_k_ptr, blocks, heads, total_q, total_k)
    q_ptr += first_q * q_n + h * q_h
    k_ptr += first_k * k_n + h * k_h
    v_ptr += first_k * v_n + h * v_h
    out_ptr += (first_q * heads + h) * HEAD_DIM
    lse_ptr += h * total_q + first_q
    scale_log2 = tl.cast(scale, tl.float32) * LOG2_E
    for row in range(block * BLOCK_M, queries, blocks * BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        q = load_parts(q_ptr, rows, q_n, queries, HEAD_DIM, COLS, True)
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        acc = zero_parts(BLOCK_M, COLS)
        for col in range(0, keys, BLOCK_N):
            cols = col + tl.arange(0, BLOCK_N)
            k = load_parts(k_ptr, cols, k_n, keys, HEAD_DIM, COLS, True)
            v = load_parts(v_ptr, cols, v_n, keys, HEAD_DIM, COLS, True)
            s = dot_rows(q, k, None, PRECISION) * scale_log2
            s = tl.where((cols < keys)[None, :], s, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1))
            p = tl.exp2(s - new_max[:, None])
            shrink = tl.exp2(row_max - new_max)
            row_sum = row_sum * shrink + tl.sum(p, 1)
            acc = dot_parts(p.to(v[0].dtype), v, scale_parts(acc, shrink[:, None]), PRECISION)
            row_max = new_max
        store_parts(out_ptr, rows, heads * HEAD_DIM, acc, (1.0 / row_sum)[:, None], queries, HEAD_DIM, COLS)
        tl.store(lse_ptr + rows, (row_max + tl.log2(row_sum)) * LN_2, mask=rows < queries)


@triton.jit
def varlen_backward_q_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, out_ptr, grad_out_ptr, lse_ptr, grad_lse_ptr, delta_ptr, dq_ptr,
    scale, heads, total_q, total_k, blocks,
    q_n, q_h, k_n, k_h, v_n, v_h,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, contiguous, and delta = rowsum(O ∘ dO) - dlse, (heads, total_q)."""
    block, h, first_q, queries, first_k, keys = place(cu_q_ptr, cu_k_ptr, blocks, heads, total_q, total_k)
    q_ptr += first_q * q_n + h * q_h
    k_ptr += first_k * k_n + h * k_h
    v_ptr += first_k * v_n + h * v_h
    out_offset, out_n = (first_q * heads + h) * HEAD_DIM, heads * HEAD_DIM
    scale = tl.cast(scale, tl.float32)
    for row in range(block * BLOCK_M, queries, blocks * BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        q = load_parts(q_ptr, rows, q_n, queries, HEAD_DIM, COLS, True)
        out = load_parts(out_ptr + out_offset, rows, out_n, queries, HEAD_DIM, COLS, True)
        grad_out = load_parts(grad_out_ptr + out_offset, rows, out_n, queries, HEAD_DIM, COLS, True)
        row_offset = h * total_q + first_q + rows
        delta = sum_of_products(out, grad_out)
        if grad_lse_ptr is not None:
            delta -= tl.load(grad_lse_ptr + row_offset, mask=rows < queries, other=0.0)
        tl.store(delta_ptr + row_offset, delta, mask=rows < queries)
        lse = tl.load(lse_ptr + row_offset, mask=rows < queries, other=float("inf")) * LOG2_E
        dq = zero_parts(BLOCK_M, COLS)
        for col in range(0, keys, BLOCK_N):
            cols = col + tl.arange(0, BLOCK_N)
            k = load_parts(k_ptr, cols, k_n, keys, HEAD_DIM, COLS, True)
            v = load_parts(v_ptr, cols, v_n, keys, HEAD_DIM, COLS, True)
            s = dot_rows(q, k, None, PRECISION) * (scale * LOG2_E)
            p = tl.exp2(tl.where((cols < keys)[None, :], s, float("-inf")) - lse[:, None])
            dp = dot_rows(grad_out, v, None, PRECISION)
            ds = p * (dp - delta[:, None])
            dq = dot_parts(ds.to(k[0].dtype), k, dq, PRECISION)
        store_parts(dq_ptr + out_offset, rows, out_n, dq, scale, queries, HEAD_DIM, COLS)


@triton.jit
def varlen_backward_kv_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, grad_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    scale, heads, total_q, total_k, blocks,
    q_n, q_h, k_n, k_h, v_n, v_h,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV, contiguous. Keys past the last get numbers of their own, which nobody stores."""
    block, h, first_q, queries, first_k, keys = place(cu_q_ptr, cu_k_ptr, blocks, heads, total_q, total_k)
    q_ptr += first_q * q_n + h * q_h
    k_ptr += first_k * k_n + h * k_h
    v_ptr += first_k * v_n + h * v_h
    out_offset, out_n = (first_q * heads + h) * HEAD_DIM, heads * HEAD_DIM
    scale = tl.cast(scale, tl.float32)
    for col in range(block * BLOCK_N, keys, blocks * BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        k = load_parts(k_ptr, cols, k_n, keys, HEAD_DIM, COLS, True)
        v = load_parts(v_ptr, cols, v_n, keys, HEAD_DIM, COLS, True)
        dk, dv = zero_parts(BLOCK_N, COLS), zero_parts(BLOCK_N, COLS)
        for row in range(0, queries, BLOCK_M):
            rows = row + tl.arange(0, BLOCK_M)
            q = load_parts(q_ptr, rows, q_n, queries, HEAD_DIM, COLS, True)
            grad_out = load_parts(grad_out_ptr + out_offset, rows, out_n, queries, HEAD_DIM, COLS, True)
            row_offset = h * total_q + first_q + rows
            lse = tl.load(lse_ptr + row_offset, mask=rows < queries, other=float("inf")) * LOG2_E
            delta = tl.load(delta_ptr + row_offset, mask=rows < queries, other=0.0)
            s_t = dot_rows(k, q, None, PRECISION) * (scale * LOG2_E)
            p_t = tl.exp2(s_t - lse[None, :])
            dv = dot_parts(p_t.to(grad_out[0].dtype), grad_out, dv, PRECISION)
            dp_t = dot_rows(v, grad_out, None, PRECISION)
            ds_t = p_t * (dp_t - delta[None, :])
            dk = dot_parts(ds_t.to(q[0].dtype), q, dk, PRECISION)
        key_offset = (first_k * heads + h) * HEAD_DIM
        store_parts(dk_ptr + key_offset, cols, out_n, dk, scale, keys, HEAD_DIM, COLS)
        store_parts(dv_ptr + key_offset, cols, out_n, dv, 1.0, keys, HEAD_DIM, COLS)


def _inputs(*tensors: Tensor) -> tuple[list[Tensor], list[int]]:
    """In a form the kernels read, and their strides of tokens and heads."""
    found = [readable(x.unsqueeze(0)).squeeze(0) for x in tensors]
    return found, [stride for x in found for stride in x.stride()[:2]]


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, scale: float, out: Tensor, lse: Tensor
):  # fmt: skip
    """Fills out (total_q, heads, head_dim) and lse (heads, total_q) where a sequence with keys is; both contiguous."""
    (q, k, v), steps = _inputs(q, k, v)
    (total_q, heads, _), total_k, options = q.shape, len(k), launch_options(q)
    blocks = max(1, triton.cdiv(longest_q, options["BLOCK_M"]))
    with torch.cuda.device_of(q):
        varlen_forward_kernel[((len(cu_q) - 1) * heads * blocks,)](
            q, k, v, cu_q.contiguous(), cu_k.contiguous(), out, lse, scale, heads, total_q, total_k, blocks,
            *steps, **options,
        )  # fmt: skip


def varlen_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, out: Tensor, lse: Tensor,
    longest_q: int, longest_k: int, scale: float, grad_lse: Tensor | None, grads: tuple[Tensor, Tensor, Tensor],
):  # fmt: skip
    """Fills grads, each as its tensor, contiguous, where a sequence is."""
    (q, k, v), steps = _inputs(q, k, v)
    grad_out, cu_q, cu_k = grad_out.contiguous(), cu_q.contiguous(), cu_k.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    (total_q, heads, _), total_k, options = q.shape, len(k), launch_options(q)
    delta, (dq, dk, dv) = torch.empty_like(lse), grads
    row_blocks = max(1, triton.cdiv(longest_q, options["BLOCK_M"]))
    key_blocks = max(1, triton.cdiv(longest_k, options["BLOCK_N"]))
    items = (len(cu_q) - 1) * heads
    with torch.cuda.device_of(q):
        varlen_backward_q_kernel[(items * row_blocks,)](
            q, k, v, cu_q, cu_k, out, grad_out, lse, grad_lse, delta, dq, scale, heads, total_q, total_k, row_blocks,
            *steps, **options,
        )  # fmt: skip
        varlen_backward_kv_kernel[(items * key_blocks,)](
            q, k, v, cu_q, cu_k, grad_out, lse, delta, dk, dv, scale, heads, total_q, total_k, key_blocks,
            *steps, **(options | BY_KEY),
        )  # fmt: skip
