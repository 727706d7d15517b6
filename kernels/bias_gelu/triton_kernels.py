"""bias_gelu: one launch forward; backward one launch and a small sum.

    t = x + b        y = t Phi(t)        dx = dy (Phi(t) + t phi(t))        db = sum over rows of dx

Phi, the normal distribution, comes from the scaled complementary error function, a polynomial of 1 / (1 + 0.44 z) with
z = |t| / sqrt 2:

    Phi(-|t|) = 1/2 exp(-t^2 / 2) erfcx(z)

so backward needs one exponential for Phi and the density phi together, and the left tail, which 1 + erf cancels away,
keeps its digits. The polynomial's relative error is 1.8e-7 (a Chebyshev fit of erfcx over z in [0, 9.5]); over
[-13, 13] in float32 the GELU is within 3.9e-7 of the true one, torch's own erf form within 1.1e-6.

Bytes that must move, M rows of C channels in half precision: 4 M C forward, 6 M C backward. An MLP of ViT-B at 198
tokens, C = 3072: 2.4 and 3.6 MB an image, 0.51 and 0.76 us on an H200 (4.8 TB/s).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_BLOCK = 1024
BLOCK_ROWS, BLOCK_COLUMNS = 8, 256  # of backward's tiles
# Backward's programs. A constant, not the number of multiprocessors: the bias' gradient is the same on every GPU.
PROGRAMS = 512


@triton.jit
def _tail_and_exp(t):
    """Phi(-|t|), and exp(-t^2 / 2)."""
    root = tl.rsqrt(1.0 + 0.31112698372208092 * tl.abs(t))  # 0.44 / sqrt 2
    u = root * root  # tl has no reciprocal, and a division takes seven instructions more
    p = 0.108769002 + u * (
        0.107558644 + u * (-0.00947181965 + u * (0.147708142 + u * (-0.138623519 + u * 0.0355314461)))
    )
    exp = tl.exp2(-0.72134752044448170 * t * t)  # log2(e) / 2
    return exp * (u * (0.1241118165 + u * (0.124416377 + u * p))), exp


@triton.jit
def bias_gelu_forward_kernel(x_ptr, bias_ptr, y_ptr, numel, C: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    column = ((start % C).to(tl.int32) + lane) % C
    mask = lane < numel - start
    t = tl.load(x_ptr + start + lane, mask=mask, other=0.0).to(tl.float32) + tl.load(bias_ptr + column).to(tl.float32)
    tail, _ = _tail_and_exp(t)
    y = t * tl.where(t < 0, tail, 1.0 - tail)
    tl.store(y_ptr + start + lane, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def bias_gelu_backward_kernel(
    grad_ptr, x_ptr, bias_ptr, dx_ptr, partial_ptr, rows, rows_per_program,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    first = tl.program_id(1) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    bias = tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)[:, None]
        offset = row.to(tl.int64) * C + column
        mask = (row < last) & (column < C)
        t = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) + bias
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tail, exp = _tail_and_exp(t)
        dx = grad * (tl.where(t < 0, tail, 1.0 - tail) + t * exp * 0.3989422804014327)  # 1 / sqrt(2 pi)
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dbias += dx
    partial = tl.sum(dbias, 0)[None, :]
    tl.store(partial_ptr + tl.program_id(1) * C + column, partial, mask=column < C)


def bias_gelu_triton(x: Tensor, bias: Tensor) -> Tensor:
    x, bias = x.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            bias_gelu_forward_kernel[(triton.cdiv(x.numel(), FORWARD_BLOCK),)](
                x, bias, y, x.numel(), C=x.shape[-1], BLOCK=FORWARD_BLOCK, num_warps=4, enable_fp_fusion=True
            )
    return y


def bias_gelu_backward_triton(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    grad, x, bias = grad.contiguous(), x.contiguous(), bias.contiguous()
    dx, C = torch.empty_like(x), x.shape[-1]
    if x.numel() == 0:
        return dx, torch.zeros_like(bias)
    rows, column_blocks = x.numel() // C, triton.cdiv(C, BLOCK_COLUMNS)
    row_blocks = triton.cdiv(rows, BLOCK_ROWS)
    blocks_per_program = triton.cdiv(row_blocks, min(row_blocks, triton.cdiv(PROGRAMS, column_blocks)))
    programs = triton.cdiv(row_blocks, blocks_per_program)
    partial = x.new_empty((programs, C), dtype=torch.float32)
    with torch.cuda.device_of(x):
        bias_gelu_backward_kernel[(column_blocks, programs)](
            grad, x, bias, dx, partial, rows, blocks_per_program * BLOCK_ROWS,
            C=C, BLOCK_R=BLOCK_ROWS, BLOCK_C=BLOCK_COLUMNS, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return dx, partial.sum(0).to(bias.dtype)
