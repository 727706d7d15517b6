"""Attention distillation head by head: KL of the maps, or MSE of the scores.

    S = s Q K^T (student), T = t Q' K'^T (teacher), R rows, M keys, softmax over keys; mean over batch B, heads H, rows
    KL    sum_j p_t (T - S) - lse_t + lse_s          dS = (p_s - p_t) / (B H R)
    MSE   sum_j (S - T)^2 / M                        dS = 2 (S - T) / (B H R M)
    dQ = s dS K                                      dK = s dS^T Q

Bytes that must move: all four tensors read once in the forward and once in the backward, both gradients written:
(2 + 1) * 2 B N H (D + D') elements for N tokens; ViT-S with a ViT-S teacher at N = 198, bfloat16: 0.9 MB an image and
layer, 0.19 us on an H200. Score tiles never leave the registers.

Forward: one program per block of rows, the online softmax of both models side by side. Backward: one program per block
of rows for dQ, and one per block of keys for dK. Both are the same kernel, which holds one side's block and streams the
other side; each recomputes its tiles of S and T, so that nothing is added up between programs and every run gives the
same bits. head_dim above 128 (32 in float32) is taken in chunks, each chunk of a gradient by a program of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels.backend import dot_precision, padded_columns, readable, strides
from fastdeit.kernels.tiles import LN_2, LOG2_E, load_rows, store_rows

# Tokens of the side that passes by, and how far ahead it is fetched: small tiles leave registers for four programs on a
# multiprocessor, which hide each other's waits (64 and 2: two or three, and a third more cycles or two by the model).
STREAMED, STAGES = 32, 3


@triton.jit
def scores(
    x_ptr, y_ptr, x, y, x_stride, y_stride, X, Y, DIM: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Tile x y^T, float32, unscaled."""
    tile = tl.zeros((x.shape[0], y.shape[0]), tl.float32)
    for start in range(0, DIM, CHUNK):
        x_tile = load_rows(x_ptr, x, x_stride, X, DIM, CHUNK, True, start)
        y_tile = load_rows(y_ptr, y, y_stride, Y, DIM, CHUNK, True, start)
        tile = tl.dot(x_tile, tl.trans(y_tile), tile, input_precision=PRECISION)
    return tile


@triton.jit
def forward_kernel(
    losses_ptr, student_lse_ptr, teacher_lse_ptr, sq_ptr, sk_ptr, tq_ptr, tk_ptr, student_scale, teacher_scale,
    H, R, M, sq_b, sq_n, sq_h, sk_b, sk_n, sk_h, tq_b, tq_n, tq_h, tk_b, tk_n, tk_h,
    MSE: tl.constexpr, DIM_S: tl.constexpr, DIM_T: tl.constexpr, CHUNK_S: tl.constexpr, CHUNK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """losses and lse: (B, H, R)."""
    blocks = tl.cdiv(R, BLOCK_R)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = item // H, item % H
    sq_ptr += b * sq_b + h * sq_h
    sk_ptr += b * sk_b + h * sk_h
    tq_ptr += b * tq_b + h * tq_h
    tk_ptr += b * tk_b + h * tk_h
    rows = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    student_scale, teacher_scale = tl.cast(student_scale, tl.float32), tl.cast(teacher_scale, tl.float32)
    if not MSE:  # powers of two are cheaper than powers of e
        student_scale, teacher_scale = student_scale * LOG2_E, teacher_scale * LOG2_E
    s_max, t_max = tl.full((BLOCK_R,), float("-inf"), tl.float32), tl.full((BLOCK_R,), float("-inf"), tl.float32)
    s_sum, t_sum = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)  # KL: of exp2(T - max) (T - S)
    for start in range(0, M, BLOCK_M):
        keys = start + tl.arange(0, BLOCK_M)
        S = student_scale * scores(sq_ptr, sk_ptr, rows, keys, sq_n, sk_n, R, M, DIM_S, CHUNK_S, PRECISION)
        T = teacher_scale * scores(tq_ptr, tk_ptr, rows, keys, tq_n, tk_n, R, M, DIM_T, CHUNK_T, PRECISION)
        difference = T - S
        if MSE:
            total += tl.sum(difference * difference, 1)  # absent keys score 0 on both sides
        else:
            S = tl.where((keys < M)[None, :], S, float("-inf"))
            T = tl.where((keys < M)[None, :], T, float("-inf"))
            new_max = tl.maximum(s_max, tl.max(S, 1))
            s_sum = s_sum * tl.exp2(s_max - new_max) + tl.sum(tl.exp2(S - new_max[:, None]), 1)
            s_max = new_max
            new_max = tl.maximum(t_max, tl.max(T, 1))
            shrink, weight = tl.exp2(t_max - new_max), tl.exp2(T - new_max[:, None])
            t_sum = t_sum * shrink + tl.sum(weight, 1)
            total = total * shrink + tl.sum(weight * difference, 1)
            t_max = new_max
    out = item * R + rows
    if MSE:
        tl.store(losses_ptr + out, total / M, mask=rows < R)
    else:
        kl = total / t_sum - (t_max - s_max) + (tl.log2(s_sum) - tl.log2(t_sum))
        tl.store(losses_ptr + out, kl * LN_2, mask=rows < R)
        tl.store(student_lse_ptr + out, (s_max + tl.log2(s_sum)) * LN_2, mask=rows < R)
        tl.store(teacher_lse_ptr + out, (t_max + tl.log2(t_sum)) * LN_2, mask=rows < R)


@triton.jit
def gradient_kernel(
    dloss_ptr, grad_ptr, student_lse_ptr, teacher_lse_ptr, sx_ptr, sy_ptr, tx_ptr, ty_ptr, student_scale, teacher_scale,
    coefficient, H, X, Y, sx_b, sx_n, sx_h, sy_b, sy_n, sy_h, tx_b, tx_n, tx_h, ty_b, ty_n, ty_h,
    OF_KEYS: tl.constexpr, MSE: tl.constexpr, DIM_S: tl.constexpr, DIM_T: tl.constexpr,
    CHUNK_S: tl.constexpr, CHUNK_T: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grad (B, X, H, DIM_S) = coefficient * dloss * dS Y: x are the rows and y the keys, or the other way OF_KEYS."""
    chunks: tl.constexpr = (DIM_S + CHUNK_S - 1) // CHUNK_S
    blocks = tl.cdiv(X, BLOCK_X) * chunks
    item = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = item // H, item % H
    sx_ptr += b * sx_b + h * sx_h
    sy_ptr += b * sy_b + h * sy_h
    tx_ptr += b * tx_b + h * tx_h
    ty_ptr += b * ty_b + h * ty_h
    x = tl.program_id(0) % blocks // chunks * BLOCK_X + tl.arange(0, BLOCK_X)
    first = tl.program_id(0) % chunks * CHUNK_S
    R = Y if OF_KEYS else X
    student_lse_ptr += item * R
    teacher_lse_ptr += item * R
    student_scale, teacher_scale = tl.cast(student_scale, tl.float32), tl.cast(teacher_scale, tl.float32)
    grad = tl.zeros((BLOCK_X, CHUNK_S), tl.float32)
    for start in range(0, Y, BLOCK_Y):
        y = start + tl.arange(0, BLOCK_Y)
        S = student_scale * scores(sx_ptr, sy_ptr, x, y, sx_n, sy_n, X, Y, DIM_S, CHUNK_S, PRECISION)
        T = teacher_scale * scores(tx_ptr, ty_ptr, x, y, tx_n, ty_n, X, Y, DIM_T, CHUNK_T, PRECISION)
        if MSE:
            dS = S - T
        else:
            rows = y if OF_KEYS else x
            s_lse = tl.load(student_lse_ptr + rows, mask=rows < R, other=0.0)
            t_lse = tl.load(teacher_lse_ptr + rows, mask=rows < R, other=0.0)
            if OF_KEYS:
                s_lse, t_lse = s_lse[None, :], t_lse[None, :]
            else:
                s_lse, t_lse = s_lse[:, None], t_lse[:, None]
            dS = tl.exp2((S - s_lse) * LOG2_E) - tl.exp2((T - t_lse) * LOG2_E)
            dS = tl.where((y < Y)[None, :], dS, 0.0)
        y_tile = load_rows(sy_ptr, y, sy_n, Y, DIM_S, CHUNK_S, True, first)
        grad = tl.dot(dS.to(y_tile.dtype), y_tile, grad, input_precision=PRECISION)
    grad *= tl.cast(coefficient, tl.float32) * tl.load(dloss_ptr).to(tl.float32)
    store_rows(grad_ptr + (b * X * H + h) * DIM_S, x, H * DIM_S, grad, X, DIM_S, CHUNK_S, first)


def block(x: Tensor) -> int:
    """Tokens of x that a program holds."""
    return max(16, min(padded_columns(x.shape[1]), 32 if x.dtype == torch.float32 else 64))


def streamed(x: Tensor) -> int:
    """Tokens of x that pass by at a time."""
    return min(block(x), STREAMED)


def chunk(x: Tensor) -> int:
    """Dimensions of x taken at a time: a power of two, and in half precision all of a usual head."""
    return max(16, min(padded_columns(x.shape[3]), 32 if x.dtype == torch.float32 else 128))


def launch_options(student: Tensor, teacher: Tensor) -> dict:
    """What every launch says of the two models' head_dims, dtype and warps."""
    chunk_s, chunk_t = chunk(student), chunk(teacher)
    return {
        "DIM_S": student.shape[3], "DIM_T": teacher.shape[3], "CHUNK_S": chunk_s, "CHUNK_T": chunk_t,
        "PRECISION": dot_precision(student), "num_warps": 8 if max(chunk_s, chunk_t) > 64 else 4,
        "num_stages": STAGES, "enable_fp_fusion": True,
    }  # fmt: skip


def forward(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    student_scale: float,
    teacher_scale: float,
    objective: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as of `reference.forward`, for objectives "kl" and "mse"."""
    student_q, student_k, teacher_q, teacher_k = map(readable, (student_q, student_k, teacher_q, teacher_k))
    (B, R, H, _), M, mse = student_q.shape, student_k.shape[1], objective == "mse"
    losses = student_q.new_empty((B, H, R), dtype=torch.float32)
    student_lse, teacher_lse = (losses.new_empty(0 if mse else (B, H, R)) for _ in range(2))
    with torch.cuda.device_of(student_q):
        forward_kernel[(B * H * triton.cdiv(R, block(student_q)),)](
            losses, student_lse, teacher_lse, student_q, student_k, teacher_q, teacher_k, student_scale, teacher_scale,
            H, R, M, *strides(student_q, student_k, teacher_q, teacher_k),
            MSE=mse, BLOCK_R=block(student_q), BLOCK_M=streamed(student_k),
            **launch_options(student_q, teacher_q),
        )  # fmt: skip
    return losses.mean(), student_lse, teacher_lse


def backward(
    dloss: Tensor,
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    student_scale: float,
    teacher_scale: float,
    objective: str,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as of `reference.backward`, for objectives "kl" and "mse"."""
    student_q, student_k, teacher_q, teacher_k = map(readable, (student_q, student_k, teacher_q, teacher_k))
    (B, R, H, _), M, mse = student_q.shape, student_k.shape[1], objective == "mse"
    chunks = triton.cdiv(student_q.shape[3], chunk(student_q))
    coefficient = student_scale / (B * H * R) * (2.0 / M if mse else 1.0)

    def gradient(student_x, student_y, teacher_x, teacher_y, of_keys):
        X, Y = student_x.shape[1], student_y.shape[1]
        grad = student_x.new_empty(student_x.shape)
        with torch.cuda.device_of(grad):
            gradient_kernel[(B * H * triton.cdiv(X, block(student_x)) * chunks,)](
                dloss, grad, student_lse, teacher_lse, student_x, student_y, teacher_x, teacher_y,
                student_scale, teacher_scale, coefficient,
                H, X, Y, *strides(student_x, student_y, teacher_x, teacher_y),
                OF_KEYS=of_keys, MSE=mse, BLOCK_X=block(student_x), BLOCK_Y=streamed(student_y),
                **launch_options(student_x, teacher_x),
            )  # fmt: skip
        return grad

    return (
        gradient(student_q, student_k, teacher_q, teacher_k, False),
        gradient(student_k, student_q, teacher_k, teacher_q, True),
    )
