"""Attention with an additive bias of its logits, and the bias' gradient.

    S = Q Kᵀ · scale + B      lse = log Σ_j exp S_ij      P = exp(S - lse)      O = P V
    dV = Pᵀ dO      dS = P ∘ (dO Vᵀ - rowsum(O ∘ dO) + dlse)      dQ = dS K · scale      dK = dSᵀ Q · scale
    dB = Σ dS over the batch entries, and heads, that share it

Tiles of the bias are read where they are used: 2 · queries · keys bytes a head more in half precision, mostly from L2
where heads of many images share them. Forward: a program a block of queries. Backward: one a block of queries (dQ, and
the rowsums), one a block of keys (dK and dV), and, where the bias is trained, one a tile of the bias, which takes
every SPLITS-th of the entries that share it in turn. The partial sums are added in an order that depends on the shapes
only, so that each run gives the same bits.

A row whose keys are all at -inf attends to nothing: its output and its gradients are 0, and its lse is -inf.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.backend import column_parts, dot_precision, readable, strides
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

BY_KEY = {"BLOCK_M": 32}  # queries at a time for dK and dV, which would spill with more of them
PROGRAMS = 512  # of the bias' gradient. A constant, so that its bits are the same on every GPU


@triton.jit
def logits(
    q, k, bias_ptr, rows, cols, bias_n, scale_log2, queries, keys, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """S · log2 e of (queries, keys), or of (keys, queries); -inf past the last of either."""
    if KEYS_FIRST:
        s = dot_rows(k, q, None, PRECISION) * scale_log2
        offsets, inside = rows[None, :] * bias_n + cols[:, None], (rows < queries)[None, :] & (cols < keys)[:, None]
    else:
        s = dot_rows(q, k, None, PRECISION) * scale_log2
        offsets, inside = rows[:, None] * bias_n + cols[None, :], (rows < queries)[:, None] & (cols < keys)[None, :]
    return s + tl.load(bias_ptr + offsets, mask=inside, other=float("-inf")).to(tl.float32) * LOG2_E


@triton.jit
def load_lse(lse_ptr, rows, queries):
    """In powers of two; +inf where there is no row, or it attends to nothing: then exp2(S - lse) is 0."""
    lse = tl.load(lse_ptr + rows, mask=rows < queries, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@triton.jit
def bias_forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, scale, heads, queries, keys, period,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, bias_b, bias_h, bias_n,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BLOCK_M)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = item // heads, item % heads
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    bias_ptr += b % period * bias_b + h * bias_h
    scale_log2 = tl.cast(scale, tl.float32) * LOG2_E
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_parts(q_ptr + b * q_b + h * q_h, rows, q_n, queries, HEAD_DIM, COLS, True)
    row_max = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite, so that -inf minus it is no NaN
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = zero_parts(BLOCK_M, COLS)
    for first in range(0, keys, BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        k = load_parts(k_ptr, cols, k_n, keys, HEAD_DIM, COLS, True)
        v = load_parts(v_ptr, cols, v_n, keys, HEAD_DIM, COLS, True)
        s = logits(q, k, bias_ptr, rows, cols, bias_n, scale_log2, queries, keys, False, PRECISION)
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp2(s - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        acc = dot_parts(p.to(v[0].dtype), v, scale_parts(acc, shrink[:, None]), PRECISION)
        row_max = new_max
    attends = row_sum > 0.0
    out_ptr += (b * queries * heads + h) * HEAD_DIM
    share = tl.where(attends, 1.0 / row_sum, 0.0)[:, None]
    store_parts(out_ptr, rows, heads * HEAD_DIM, acc, share, queries, HEAD_DIM, COLS)
    lse = tl.where(attends, (row_max + tl.log2(row_sum)) * LN_2, float("-inf"))
    tl.store(lse_ptr + item * queries + rows, lse, mask=rows < queries)


@triton.jit
def bias_backward_q_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, grad_out_ptr, lse_ptr, grad_lse_ptr, delta_ptr, dq_ptr,
    scale, heads, queries, keys, period,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, bias_b, bias_h, bias_n,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, contiguous, and delta = rowsum(O ∘ dO) - dlse, (batch, heads, queries)."""
    blocks = tl.cdiv(queries, BLOCK_M)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = item // heads, item % heads
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    bias_ptr += b % period * bias_b + h * bias_h
    scale = tl.cast(scale, tl.float32)
    out_offset, out_n = (b * queries * heads + h) * HEAD_DIM, heads * HEAD_DIM
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_parts(q_ptr + b * q_b + h * q_h, rows, q_n, queries, HEAD_DIM, COLS, True)
    out = load_parts(out_ptr + out_offset, rows, out_n, queries, HEAD_DIM, COLS, True)
    grad_out = load_parts(grad_out_ptr + out_offset, rows, out_n, queries, HEAD_DIM, COLS, True)
    delta = sum_of_products(out, grad_out)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + item * queries + rows, mask=rows < queries, other=0.0)
    tl.store(delta_ptr + item * queries + rows, delta, mask=rows < queries)
    lse = load_lse(lse_ptr + item * queries, rows, queries)
    dq = zero_parts(BLOCK_M, COLS)
    for first in range(0, keys, BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        k = load_parts(k_ptr, cols, k_n, keys, HEAD_DIM, COLS, True)
        v = load_parts(v_ptr, cols, v_n, keys, HEAD_DIM, COLS, True)
        s = logits(q, k, bias_ptr, rows, cols, bias_n, scale * LOG2_E, queries, keys, False, PRECISION)
        dp = dot_rows(grad_out, v, None, PRECISION)
        ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
        dq = dot_parts(ds.to(k[0].dtype), k, dq, PRECISION)
    store_parts(dq_ptr + out_offset, rows, out_n, dq, scale, queries, HEAD_DIM, COLS)


@triton.jit
def bias_backward_kv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, grad_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    scale, heads, queries, keys, period,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, bias_b, bias_h, bias_n,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV, contiguous."""
    blocks = tl.cdiv(keys, BLOCK_N)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = item // heads, item % heads
    q_ptr += b * q_b + h * q_h
    bias_ptr += b % period * bias_b + h * bias_h
    grad_out_ptr += (b * queries * heads + h) * HEAD_DIM
    scale = tl.cast(scale, tl.float32)
    cols = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_parts(k_ptr + b * k_b + h * k_h, cols, k_n, keys, HEAD_DIM, COLS, True)
    v = load_parts(v_ptr + b * v_b + h * v_h, cols, v_n, keys, HEAD_DIM, COLS, True)
    dk, dv = zero_parts(BLOCK_N, COLS), zero_parts(BLOCK_N, COLS)
    for first in range(0, queries, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        q = load_parts(q_ptr, rows, q_n, queries, HEAD_DIM, COLS, True)
        grad_out = load_parts(grad_out_ptr, rows, heads * HEAD_DIM, queries, HEAD_DIM, COLS, True)
        lse = load_lse(lse_ptr + item * queries, rows, queries)
        delta = tl.load(delta_ptr + item * queries + rows, mask=rows < queries, other=0.0)
        s_t = logits(q, k, bias_ptr, rows, cols, bias_n, scale * LOG2_E, queries, keys, True, PRECISION)
        p_t = tl.exp2(s_t - lse[None, :])
        dv = dot_parts(p_t.to(grad_out[0].dtype), grad_out, dv, PRECISION)
        dp_t = dot_rows(v, grad_out, None, PRECISION)
        ds_t = p_t * (dp_t - delta[None, :])
        dk = dot_parts(ds_t.to(q[0].dtype), q, dk, PRECISION)
    offset = (b * keys * heads + h) * HEAD_DIM
    store_parts(dk_ptr + offset, cols, heads * HEAD_DIM, dk, scale, keys, HEAD_DIM, COLS)
    store_parts(dv_ptr + offset, cols, heads * HEAD_DIM, dv, 1.0, keys, HEAD_DIM, COLS)


@triton.jit
def bias_gradient_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, grad_out_ptr, lse_ptr, delta_ptr, partial_ptr,
    scale, batch, heads, queries, keys, period, bias_heads,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, bias_b, bias_h, bias_n,
    HEAD_DIM: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """partial (splits, period, bias_heads, queries, keys); `splits` programs for each tile of the bias."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    across = tl.cdiv(keys, BLOCK_N)
    tiles = tl.cdiv(queries, BLOCK_M) * across
    tile, which = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    residue, bias_head = which // bias_heads, which % bias_heads
    rows = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    bias_ptr += residue * bias_b + bias_head * bias_h
    scale = tl.cast(scale, tl.float32)
    sharing = heads // bias_heads  # heads of an entry that share the bias: one, or all
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(split, batch // period * sharing, splits):
        b, h = residue + i // sharing * period, bias_head + i % sharing
        q = load_parts(q_ptr + b * q_b + h * q_h, rows, q_n, queries, HEAD_DIM, COLS, True)
        k = load_parts(k_ptr + b * k_b + h * k_h, cols, k_n, keys, HEAD_DIM, COLS, True)
        v = load_parts(v_ptr + b * v_b + h * v_h, cols, v_n, keys, HEAD_DIM, COLS, True)
        row_offset = (b * heads + h) * queries
        grad_out = load_parts(
            grad_out_ptr + (b * queries * heads + h) * HEAD_DIM, rows, heads * HEAD_DIM, queries, HEAD_DIM, COLS, True
        )
        lse = load_lse(lse_ptr + row_offset, rows, queries)
        delta = tl.load(delta_ptr + row_offset + rows, mask=rows < queries, other=0.0)
        s = logits(q, k, bias_ptr, rows, cols, bias_n, scale * LOG2_E, queries, keys, False, PRECISION)
        dp = dot_rows(grad_out, v, None, PRECISION)
        total += tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
    partial_ptr += (split.to(tl.int64) * period * bias_heads + which) * queries * keys
    inside = (rows < queries)[:, None] & (cols < keys)[None, :]
    tl.store(partial_ptr + rows[:, None].to(tl.int64) * keys + cols[None, :], total, mask=inside)


def launch_options(q: Tensor) -> dict:
    head_dim, single = q.shape[-1], q.dtype == torch.float32
    columns = column_parts(head_dim)
    return {
        "HEAD_DIM": head_dim, "COLS": columns, "BLOCK_M": 32 if single else 64, "BLOCK_N": 32 if single else 64,
        "PRECISION": dot_precision(q), "num_warps": 8 if sum(columns) == 128 else 4, "num_stages": 1 if single else 2,
        "enable_fp_fusion": True,
    }  # fmt: skip


def _readable_bias(bias: Tensor) -> Tensor:
    """A bias (period, heads or 1, queries, keys) whose keys lie beside each other."""
    return bias if bias.stride(3) == 1 or bias.shape[3] == 1 else bias.contiguous()


def _bias_strides(bias: Tensor) -> tuple[int, int, int]:
    """Of the period, heads (0 where all share one) and queries."""
    return bias.stride(0), 0 if bias.shape[1] == 1 else bias.stride(1), bias.stride(2)


def bias_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output (batch, queries, heads, head_dim) and lse (batch, heads, queries)."""
    q, k, v, bias = readable(q), readable(k), readable(v), _readable_bias(bias)
    (batch, queries, heads, _), keys, options = q.shape, k.shape[1], launch_options(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        bias_forward_kernel[(batch * heads * triton.cdiv(queries, options["BLOCK_M"]),)](
            q, k, v, bias, out, lse, scale, heads, queries, keys, len(bias),
            *strides(q, k, v), *_bias_strides(bias), **options,
        )  # fmt: skip
    return out, lse


def bias_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, lse: Tensor, scale: float,
    grad_lse: Tensor | None, with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, and of the bias if wanted."""
    q, k, v, bias, grad_out = readable(q), readable(k), readable(v), _readable_bias(bias), grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    (batch, queries, heads, _), keys, options = q.shape, k.shape[1], launch_options(q)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    period, bias_heads = bias.shape[:2]
    common = *strides(q, k, v), *_bias_strides(bias)
    row_blocks, key_blocks = triton.cdiv(queries, options["BLOCK_M"]), triton.cdiv(keys, options["BLOCK_N"])
    with torch.cuda.device_of(q):
        bias_backward_q_kernel[(batch * heads * row_blocks,)](
            q, k, v, bias, out, grad_out, lse, grad_lse, delta, dq, scale, heads, queries, keys, period,
            *common, **options,
        )  # fmt: skip
        bias_backward_kv_kernel[(batch * heads * key_blocks,)](
            q, k, v, bias, grad_out, lse, delta, dk, dv, scale, heads, queries, keys, period,
            *common, **(options | BY_KEY),
        )  # fmt: skip
        if not with_bias:
            return dq, dk, dv, None
        tiles = row_blocks * key_blocks * period * bias_heads
        sharing = batch // period * (heads // bias_heads)
        splits = min(sharing, triton.cdiv(PROGRAMS, tiles))
        partial = torch.empty((splits, *bias.shape), dtype=torch.float32, device=q.device)
        bias_gradient_kernel[(tiles, splits)](
            q, k, v, bias, grad_out, lse, delta, partial, scale, batch, heads, queries, keys, period, bias_heads,
            *common, **options,
        )  # fmt: skip
    return dq, dk, dv, (partial[0] if splits == 1 else partial.sum(0)).to(bias.dtype)
