"""KL between attention maps averaged over heads, which student and teacher may have different numbers of.

    P_h = softmax(S_h) over keys, p = mean_h P_h (student), t likewise (teacher)
    loss  = sum_j t (log t - log p), mean over batch and rows; p and t floored at 2^-100 inside the logarithms
    dS_h  = P_h (delta_h - t / p) / (B H R),   delta_h = sum_j P_h t / p

An average needs all heads at once, and the softmax of each needs its whole row. So: one launch for the log-sum-exps of
each model; one for the loss, which forms a tile of p and t by walking over the heads, and then delta by walking again;
in the backward one for dQ and one for dK, each of which forms the tile of t / p and then walks over the heads that
receive a gradient. Student scores are computed 3 times in the forward and 4 times in the backward, the teacher's 2 and
2 times; against head by head that is 2.5 and 1.5 times the work. Beside the lse, what goes to memory is delta and,
where one tile does not span the streamed side, a float32 gradient: both are added to tile by tile, by the one program
that owns them, so that every run gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import dot_precision
from .reference import FLOOR
from .tiles import (
    LN_2,
    LOG2_E,
    block,
    chunk,
    chunks,
    launch_options,
    load_tile,
    readable,
    scores,
    store_tile,
    strides,
)  # fmt: skip

LEAST = tl.constexpr(FLOOR)


@triton.jit
def lse_kernel(
    lse_ptr, q_ptr, k_ptr, scale, H, R, M, q_b, q_n, q_h, k_b, k_n, k_h,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lse (B, H, R) of the scores of one model."""
    blocks = tl.cdiv(R, BLOCK_R)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = item // H, item % H
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    rows = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    scale = tl.cast(scale, tl.float32) * LOG2_E
    row_max, row_sum = tl.full((BLOCK_R,), float("-inf"), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, M, BLOCK_M):
        keys = start + tl.arange(0, BLOCK_M)
        S = scale * scores(q_ptr, k_ptr, rows, keys, q_n, k_n, R, M, DIM, CHUNK, PRECISION)
        S = tl.where((keys < M)[None, :], S, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(S, 1))
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(S - new_max[:, None]), 1)
        row_max = new_max
    tl.store(lse_ptr + item * R + rows, (row_max + tl.log2(row_sum)) * LN_2, mask=rows < R)


@triton.jit
def _along_rows(values, OF_KEYS: tl.constexpr):
    """A number for each row, as wide as a tile whose rows are x, or y OF_KEYS."""
    if OF_KEYS:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def _map(
    x_ptr, y_ptr, lse_ptr, h, x, y, x_n, x_h, y_n, y_h, X, Y, scale,
    OF_KEYS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile of head h's attention map; 0 outside."""
    tile = scores(x_ptr + h * x_h, y_ptr + h * y_h, x, y, x_n, y_n, X, Y, DIM, CHUNK, PRECISION)
    R, rows = (Y, y) if OF_KEYS else (X, x)
    lse = tl.load(lse_ptr + h * R + rows, mask=rows < R, other=float("inf"))
    tile = tl.exp2((scale * tile - _along_rows(lse, OF_KEYS)) * LOG2_E)
    return tl.where((x < X)[:, None] & (y < Y)[None, :], tile, 0.0)


@triton.jit
def _mean_map(
    x_ptr, y_ptr, lse_ptr, H, x, y, x_n, x_h, y_n, y_h, X, Y, scale,
    OF_KEYS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((x.shape[0], y.shape[0]), tl.float32)
    for h in range(0, H):
        total += _map(
            x_ptr, y_ptr, lse_ptr, h, x, y, x_n, x_h, y_n, y_h, X, Y, scale, OF_KEYS, DIM, CHUNK, PRECISION
        )  # fmt: skip
    return total / H


@triton.jit
def _ratio(p, t):
    """Minus the derivative of the loss by p; 0 below the floor."""
    return tl.where(p >= LEAST, t / tl.maximum(p, LEAST), 0.0)


@triton.jit
def loss_kernel(
    losses_ptr, delta_ptr, student_lse_ptr, teacher_lse_ptr, sq_ptr, sk_ptr, tq_ptr, tk_ptr,
    student_scale, teacher_scale, H_S, H_T, R, M,
    sq_b, sq_n, sq_h, sk_b, sk_n, sk_h, tq_b, tq_n, tq_h, tk_b, tk_n, tk_h,
    DIM_S: tl.constexpr, DIM_T: tl.constexpr, CHUNK_S: tl.constexpr, CHUNK_T: tl.constexpr,
    WITH_DELTA: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """losses (B, R); delta (B, H_S, R)."""
    blocks = tl.cdiv(R, BLOCK_R)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    sq_ptr += b * sq_b
    sk_ptr += b * sk_b
    tq_ptr += b * tq_b
    tk_ptr += b * tk_b
    student_lse_ptr += b * H_S * R
    teacher_lse_ptr += b * H_T * R
    rows = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    student_scale, teacher_scale = tl.cast(student_scale, tl.float32), tl.cast(teacher_scale, tl.float32)
    delta_ptr += b * H_S * R + rows
    loss = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, M, BLOCK_M):
        keys = start + tl.arange(0, BLOCK_M)
        p = _mean_map(
            sq_ptr, sk_ptr, student_lse_ptr, H_S, rows, keys, sq_n, sq_h, sk_n, sk_h, R, M, student_scale,
            False, DIM_S, CHUNK_S, PRECISION,
        )  # fmt: skip
        t = _mean_map(
            tq_ptr, tk_ptr, teacher_lse_ptr, H_T, rows, keys, tq_n, tq_h, tk_n, tk_h, R, M, teacher_scale,
            False, DIM_T, CHUNK_T, PRECISION,
        )  # fmt: skip
        loss += tl.sum(t * (tl.log2(tl.maximum(t, LEAST)) - tl.log2(tl.maximum(p, LEAST))), 1)
        if WITH_DELTA:
            ratio = _ratio(p, t)
            for h in range(0, H_S):
                P = _map(
                    sq_ptr, sk_ptr, student_lse_ptr, h, rows, keys, sq_n, sq_h, sk_n, sk_h, R, M, student_scale,
                    False, DIM_S, CHUNK_S, PRECISION,
                )  # fmt: skip
                delta = tl.sum(P * ratio, 1)
                if start > 0:
                    delta += tl.load(delta_ptr + h * R, mask=rows < R, other=0.0)
                tl.store(delta_ptr + h * R, delta, mask=rows < R)
            tl.debug_barrier()  # before another thread may read what this one wrote
    tl.store(losses_ptr + b * R + rows, loss * LN_2, mask=rows < R)


@triton.jit
def mean_gradient_kernel(
    dloss_ptr, grad_ptr, delta_ptr, student_lse_ptr, teacher_lse_ptr, sx_ptr, sy_ptr, tx_ptr, ty_ptr,
    student_scale, teacher_scale, coefficient, H_S, H_T, X, Y,
    sx_b, sx_n, sx_h, sy_b, sy_n, sy_h, tx_b, tx_n, tx_h, ty_b, ty_n, ty_h,
    OF_KEYS: tl.constexpr, DIM_S: tl.constexpr, DIM_T: tl.constexpr, CHUNK_S: tl.constexpr, CHUNK_T: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad (B, X, H_S, DIM_S) = coefficient * dloss * dS_h Y_h: x are rows and y keys, or the other way OF_KEYS."""
    chunks: tl.constexpr = (DIM_S + CHUNK_S - 1) // CHUNK_S
    blocks = tl.cdiv(X, BLOCK_X) * chunks
    b = (tl.program_id(0) // blocks).to(tl.int64)
    sx_ptr += b * sx_b
    sy_ptr += b * sy_b
    tx_ptr += b * tx_b
    ty_ptr += b * ty_b
    x = tl.program_id(0) % blocks // chunks * BLOCK_X + tl.arange(0, BLOCK_X)
    first = tl.program_id(0) % chunks * CHUNK_S
    R = Y if OF_KEYS else X
    student_lse_ptr += b * H_S * R
    teacher_lse_ptr += b * H_T * R
    delta_ptr += b * H_S * R
    grad_ptr += b * X * H_S * DIM_S
    student_scale, teacher_scale = tl.cast(student_scale, tl.float32), tl.cast(teacher_scale, tl.float32)
    coefficient = tl.cast(coefficient, tl.float32) * tl.load(dloss_ptr).to(tl.float32)
    for start in range(0, Y, BLOCK_Y):
        y = start + tl.arange(0, BLOCK_Y)
        p = _mean_map(
            sx_ptr, sy_ptr, student_lse_ptr, H_S, x, y, sx_n, sx_h, sy_n, sy_h, X, Y, student_scale,
            OF_KEYS, DIM_S, CHUNK_S, PRECISION,
        )  # fmt: skip
        t = _mean_map(
            tx_ptr, ty_ptr, teacher_lse_ptr, H_T, x, y, tx_n, tx_h, ty_n, ty_h, X, Y, teacher_scale,
            OF_KEYS, DIM_T, CHUNK_T, PRECISION,
        )  # fmt: skip
        ratio = _ratio(p, t)
        for h in range(0, H_S):
            P = _map(
                sx_ptr, sy_ptr, student_lse_ptr, h, x, y, sx_n, sx_h, sy_n, sy_h, X, Y, student_scale,
                OF_KEYS, DIM_S, CHUNK_S, PRECISION,
            )  # fmt: skip
            rows = y if OF_KEYS else x
            delta = tl.load(delta_ptr + h * R + rows, mask=rows < R, other=0.0)
            dS = P * (_along_rows(delta, OF_KEYS) - ratio)
            y_tile = load_tile(sy_ptr + h * sy_h, y, sy_n, Y, first, DIM_S, CHUNK_S)
            grad = coefficient * tl.dot(dS.to(y_tile.dtype), y_tile, input_precision=PRECISION)
            head_ptr = grad_ptr + h * DIM_S
            if start > 0:
                grad += load_tile(head_ptr, x, H_S * DIM_S, X, first, DIM_S, CHUNK_S).to(tl.float32)
            store_tile(head_ptr, grad, x, H_S * DIM_S, X, first, DIM_S, CHUNK_S)
        tl.debug_barrier()  # before another thread may read what this one wrote


def forward(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    student_scale: float,
    teacher_scale: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as of `reference.forward`, for objective "mean_kl"."""
    student_q, student_k, teacher_q, teacher_k = map(readable, (student_q, student_k, teacher_q, teacher_k))
    (B, R, H_S, _), M, H_T = student_q.shape, student_k.shape[1], teacher_q.shape[2]
    student_lse = _lse(student_q, student_k, student_scale)
    teacher_lse = _lse(teacher_q, teacher_k, teacher_scale)
    losses = student_lse.new_empty((B, R))
    delta = torch.empty_like(student_lse) if with_grad else losses.new_empty(0)
    with torch.cuda.device_of(student_q):
        loss_kernel[(B * triton.cdiv(R, block(student_q)),)](
            losses, delta, student_lse, teacher_lse, student_q, student_k, teacher_q, teacher_k,
            student_scale, teacher_scale, H_S, H_T, R, M, *strides(student_q, student_k, teacher_q, teacher_k),
            WITH_DELTA=with_grad, BLOCK_R=block(student_q), BLOCK_M=block(student_k),
            **launch_options(student_q, teacher_q), num_stages=1,
        )  # fmt: skip
    return losses.mean(), student_lse, teacher_lse, delta


def _lse(q: Tensor, k: Tensor, scale: float) -> Tensor:
    (B, R, H, head_dim), M = q.shape, k.shape[1]
    lse = q.new_empty((B, H, R), dtype=torch.float32)
    with torch.cuda.device_of(q):
        lse_kernel[(B * H * triton.cdiv(R, block(q)),)](
            lse, q, k, scale, H, R, M, *strides(q, k), DIM=head_dim, CHUNK=chunk(q), BLOCK_R=block(q), BLOCK_M=block(k),
            PRECISION=dot_precision(q), num_warps=8 if chunk(q) > 64 else 4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return lse


def backward(
    dloss: Tensor,
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    delta: Tensor,
    student_scale: float,
    teacher_scale: float,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as of `reference.backward`, for objective "mean_kl"."""
    student_q, student_k, teacher_q, teacher_k = map(readable, (student_q, student_k, teacher_q, teacher_k))
    (B, R, H_S, _), H_T = student_q.shape, teacher_q.shape[2]
    coefficient = student_scale / (B * H_S * R)

    def gradient(student_x, student_y, teacher_x, teacher_y, of_keys):
        X, Y = student_x.shape[1], student_y.shape[1]
        grad = student_x.new_empty(student_x.shape, dtype=student_x.dtype if Y <= block(student_y) else torch.float32)
        with torch.cuda.device_of(grad):
            mean_gradient_kernel[(B * triton.cdiv(X, block(student_x)) * chunks(student_x),)](
                dloss, grad, delta, student_lse, teacher_lse, student_x, student_y, teacher_x, teacher_y,
                student_scale, teacher_scale, coefficient, H_S, H_T, X, Y,
                *strides(student_x, student_y, teacher_x, teacher_y),
                OF_KEYS=of_keys, BLOCK_X=block(student_x), BLOCK_Y=block(student_y),
                **launch_options(student_x, teacher_x), num_stages=1,
            )  # fmt: skip
        return grad.to(student_x.dtype)

    return (
        gradient(student_q, student_k, teacher_q, teacher_k, False),
        gradient(student_k, student_q, teacher_k, teacher_q, True),
    )
