"""Attention of sequences packed one after another: the formulas of reference.py, within each sequence.

A sequence is told by its place in cu_seqlens, which only the kernels read. The launch knows how many sequences there
are and how long the longest should be, and makes that many blocks for each; one of a shorter sequence has nothing to
do, and where a sequence is longer than said each of its blocks takes every blocks-th tile. What cu_seqlens says beyond
the tokens there are is cut off, so that nothing else in memory is touched.

Forward: a program a block of queries. Backward: one a block of queries (dQ, and the rowsums), then one a block of keys
(dK and dV). No atomics: each run gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.backend import readable
from fastdeit.kernels.tiles import LN_2, LOG2_E, load_rows, store_rows

from .triton_bias import launch_options


@triton.jit
def place(cu_ptr, blocks, heads, total):
    """Of this program: its block, its head, the sequence's first token and number of tokens."""
    item = tl.program_id(0) // blocks
    b = item // heads
    first = tl.minimum(tl.maximum(tl.load(cu_ptr + b), 0), total)
    last = tl.maximum(tl.minimum(tl.load(cu_ptr + b + 1), total), first)
    return tl.program_id(0) % blocks, (item % heads).to(tl.int64), first.to(tl.int64), last - first


@triton.jit
def varlen_forward_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, out_ptr, lse_ptr, scale, heads, total, blocks,
    q_n, q_h, k_n, k_h, v_n, v_h,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    block, h, first, tokens = place(cu_ptr, blocks, heads, total)
    q_ptr += first * q_n + h * q_h
    k_ptr += first * k_n + h * k_h
    v_ptr += first * v_n + h * v_h
    out_ptr += (first * heads + h) * HEAD_DIM
    lse_ptr += h * total + first
    scale_log2 = tl.cast(scale, tl.float32) * LOG2_E
    for row in range(block * BLOCK_M, tokens, blocks * BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, rows, q_n, tokens, HEAD_DIM, COLS, True)
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, COLS), tl.float32)
        for col in range(0, tokens, BLOCK_N):
            cols = col + tl.arange(0, BLOCK_N)
            k = load_rows(k_ptr, cols, k_n, tokens, HEAD_DIM, COLS, True)
            v = load_rows(v_ptr, cols, v_n, tokens, HEAD_DIM, COLS, True)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
            s = tl.where((cols < tokens)[None, :], s, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1))
            p = tl.exp2(s - new_max[:, None])
            shrink = tl.exp2(row_max - new_max)
            row_sum = row_sum * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            row_max = new_max
        store_rows(out_ptr, rows, heads * HEAD_DIM, acc * (1.0 / row_sum)[:, None], tokens, HEAD_DIM, COLS)
        tl.store(lse_ptr + rows, (row_max + tl.log2(row_sum)) * LN_2, mask=rows < tokens)


@triton.jit
def varlen_backward_q_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, out_ptr, grad_out_ptr, lse_ptr, grad_lse_ptr, delta_ptr, dq_ptr,
    scale, heads, total, blocks,
    q_n, q_h, k_n, k_h, v_n, v_h,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, contiguous, and delta = rowsum(O ∘ dO) - dlse, (heads, total)."""
    block, h, first, tokens = place(cu_ptr, blocks, heads, total)
    q_ptr += first * q_n + h * q_h
    k_ptr += first * k_n + h * k_h
    v_ptr += first * v_n + h * v_h
    out_offset, out_n = (first * heads + h) * HEAD_DIM, heads * HEAD_DIM
    scale = tl.cast(scale, tl.float32)
    for row in range(block * BLOCK_M, tokens, blocks * BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, rows, q_n, tokens, HEAD_DIM, COLS, True)
        out = load_rows(out_ptr + out_offset, rows, out_n, tokens, HEAD_DIM, COLS, True)
        grad_out = load_rows(grad_out_ptr + out_offset, rows, out_n, tokens, HEAD_DIM, COLS, True)
        row_offset = h * total + first + rows
        delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
        if grad_lse_ptr is not None:
            delta -= tl.load(grad_lse_ptr + row_offset, mask=rows < tokens, other=0.0)
        tl.store(delta_ptr + row_offset, delta, mask=rows < tokens)
        lse = tl.load(lse_ptr + row_offset, mask=rows < tokens, other=float("inf")) * LOG2_E
        dq = tl.zeros((BLOCK_M, COLS), tl.float32)
        for col in range(0, tokens, BLOCK_N):
            cols = col + tl.arange(0, BLOCK_N)
            k = load_rows(k_ptr, cols, k_n, tokens, HEAD_DIM, COLS, True)
            v = load_rows(v_ptr, cols, v_n, tokens, HEAD_DIM, COLS, True)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
            p = tl.exp2(tl.where((cols < tokens)[None, :], s, float("-inf")) - lse[:, None])
            dp = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        store_rows(dq_ptr + out_offset, rows, out_n, dq * scale, tokens, HEAD_DIM, COLS)


@triton.jit
def varlen_backward_kv_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, grad_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    scale, heads, total, blocks,
    q_n, q_h, k_n, k_h, v_n, v_h,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV, contiguous. Keys past the last get numbers of their own, which nobody stores."""
    block, h, first, tokens = place(cu_ptr, blocks, heads, total)
    q_ptr += first * q_n + h * q_h
    k_ptr += first * k_n + h * k_h
    v_ptr += first * v_n + h * v_h
    out_offset, out_n = (first * heads + h) * HEAD_DIM, heads * HEAD_DIM
    scale = tl.cast(scale, tl.float32)
    for col in range(block * BLOCK_N, tokens, blocks * BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, cols, k_n, tokens, HEAD_DIM, COLS, True)
        v = load_rows(v_ptr, cols, v_n, tokens, HEAD_DIM, COLS, True)
        dk, dv = tl.zeros((BLOCK_N, COLS), tl.float32), tl.zeros((BLOCK_N, COLS), tl.float32)
        for row in range(0, tokens, BLOCK_M):
            rows = row + tl.arange(0, BLOCK_M)
            q = load_rows(q_ptr, rows, q_n, tokens, HEAD_DIM, COLS, True)
            grad_out = load_rows(grad_out_ptr + out_offset, rows, out_n, tokens, HEAD_DIM, COLS, True)
            row_offset = h * total + first + rows
            lse = tl.load(lse_ptr + row_offset, mask=rows < tokens, other=float("inf")) * LOG2_E
            delta = tl.load(delta_ptr + row_offset, mask=rows < tokens, other=0.0)
            s_t = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E)
            p_t = tl.exp2(s_t - lse[None, :])
            dv = tl.dot(p_t.to(grad_out.dtype), grad_out, dv, input_precision=PRECISION)
            dp_t = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
            ds_t = p_t * (dp_t - delta[None, :])
            dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)
        store_rows(dk_ptr + out_offset, cols, out_n, dk * scale, tokens, HEAD_DIM, COLS)
        store_rows(dv_ptr + out_offset, cols, out_n, dv, tokens, HEAD_DIM, COLS)


def _inputs(*tensors: Tensor) -> tuple[list[Tensor], list[int]]:
    """In a form the kernels read, and their strides of tokens and heads."""
    found = [readable(x.unsqueeze(0)).squeeze(0) for x in tensors]
    return found, [stride for x in found for stride in x.stride()[:2]]


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, out: Tensor, lse: Tensor
):  # fmt: skip
    """Fills out (total, heads, head_dim) and lse (heads, total) where a sequence is; both contiguous."""
    (q, k, v), steps = _inputs(q, k, v)
    (total, heads, _), options = q.shape, launch_options(q)
    blocks = max(1, triton.cdiv(max_seqlen, options["BLOCK_M"]))
    with torch.cuda.device_of(q):
        varlen_forward_kernel[((len(cu_seqlens) - 1) * heads * blocks,)](
            q, k, v, cu_seqlens.contiguous(), out, lse, scale, heads, total, blocks, *steps, **options
        )


def varlen_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, out: Tensor, lse: Tensor, max_seqlen: int,
    scale: float, grad_lse: Tensor | None, grads: tuple[Tensor, Tensor, Tensor],
):  # fmt: skip
    """Fills grads, each as out, where a sequence is."""
    (q, k, v), steps = _inputs(q, k, v)
    grad_out, cu_seqlens = grad_out.contiguous(), cu_seqlens.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    (total, heads, _), options, delta = q.shape, launch_options(q), torch.empty_like(lse)
    dq, dk, dv = grads
    by_key = options | {"BLOCK_M": 32}  # with more of them dK and dV would spill
    row_blocks, key_blocks = (max(1, triton.cdiv(max_seqlen, options[side])) for side in ("BLOCK_M", "BLOCK_N"))
    items = (len(cu_seqlens) - 1) * heads
    with torch.cuda.device_of(q):
        varlen_backward_q_kernel[(items * row_blocks,)](
            q, k, v, cu_seqlens, out, grad_out, lse, grad_lse, delta, dq, scale, heads, total, row_blocks,
            *steps, **options,
        )  # fmt: skip
        varlen_backward_kv_kernel[(items * key_blocks,)](
            q, k, v, cu_seqlens, grad_out, lse, delta, dk, dv, scale, heads, total, key_blocks, *steps, **by_key
        )
