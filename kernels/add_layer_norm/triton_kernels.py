"""add_layer_norm: one launch forward; backward one launch and a small sum.

    r = residual + s_b gamma x        n = (r - mean r) rstd        y = w n + b
    dr = h + rstd (w g - mean(w g) - n mean(w g n))                g, h: gradients of y and r
    d residual = dr        dx = s_b gamma dr        dw = sum g n        db = sum g        dgamma = sum s_b x dr

Bytes that must move, M rows of C channels, all in half precision: forward 8 M C (x, residual, r, y), backward 10 M C
(g, h, r, dx, d residual), 12 with a gamma (x again). ViT-B at 198 tokens: 1.2 and 1.5 MB an image, 0.25 and 0.32 us on
an H200 (4.8 TB/s).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Backward's programs. A constant, not the number of multiprocessors: the weights' gradients are the same on every GPU.
PROGRAMS = 512
# Numbers of one tensor that a program holds at a time. Forward takes single rows: with several in a tile, the compiler
# passes results through shared memory. Backward has few programs, which need more in flight.
FORWARD_TILE, BACKWARD_TILE = 1, 1024


@triton.jit
def _load_row_vector(ptr, channel, C: tl.constexpr):
    return tl.load(ptr + channel, mask=channel < C, other=0.0).to(tl.float32)


@triton.jit
def add_layer_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, gamma_ptr, drop_path_ptr,
    normed_ptr, new_residual_ptr, mean_ptr, rstd_ptr, rows, rows_per_sample, eps,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK_C)[None, :]
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    in_rows = row < rows
    mask = in_rows & (channel < C)
    offset = row.to(tl.int64) * C + channel

    branch = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if gamma_ptr is not None:
        branch *= _load_row_vector(gamma_ptr, channel, C)
    if drop_path_ptr is not None:
        branch *= tl.load(drop_path_ptr + row // rows_per_sample, mask=in_rows, other=0.0).to(tl.float32)
    stored = (tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32) + branch).to(
        new_residual_ptr.dtype.element_ty
    )
    tl.store(new_residual_ptr + offset, stored, mask=mask)

    r = stored.to(tl.float32)
    mean = tl.sum(r, 1)[:, None] / C
    centered = tl.where(channel < C, r - mean, 0.0)
    variance = tl.sum(centered * centered, 1)[:, None] / C
    rstd = 1.0 / tl.sqrt(variance + tl.cast(eps, tl.float32))
    normed = centered * rstd * _load_row_vector(weight_ptr, channel, C) + _load_row_vector(bias_ptr, channel, C)
    tl.store(normed_ptr + offset, normed.to(normed_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean, mask=in_rows)
    tl.store(rstd_ptr + row, rstd, mask=in_rows)


@triton.jit
def add_layer_norm_backward_kernel(
    grad_normed_ptr, grad_residual_ptr, x_ptr, new_residual_ptr, mean_ptr, rstd_ptr,
    weight_ptr, gamma_ptr, drop_path_ptr, dx_ptr, d_residual_ptr, partial_ptr,
    rows, rows_per_program, rows_per_sample,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK_C)[None, :]
    first = tl.program_id(0) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    weight = _load_row_vector(weight_ptr, channel, C)
    if gamma_ptr is not None:
        gamma = _load_row_vector(gamma_ptr, channel, C)
    d_weight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    d_bias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    d_gamma = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)[:, None]
        in_rows = row < last
        mask = in_rows & (channel < C)
        offset = row.to(tl.int64) * C + channel

        d_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        if grad_residual_ptr is not None:
            d_sum = tl.load(grad_residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if grad_normed_ptr is not None:
            mean = tl.load(mean_ptr + row, mask=in_rows, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)
            r = tl.load(new_residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(grad_normed_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            normalized = tl.where(mask, (r - mean) * rstd, 0.0)
            scaled = weight * grad
            shift = tl.sum(scaled, 1)[:, None] / C
            projection = tl.sum(scaled * normalized, 1)[:, None] / C
            d_sum += rstd * (scaled - shift - normalized * projection)
            d_weight += grad * normalized
            d_bias += grad
        tl.store(d_residual_ptr + offset, d_sum.to(d_residual_ptr.dtype.element_ty), mask=mask)

        dx = d_sum
        if drop_path_ptr is not None:
            dx *= tl.load(drop_path_ptr + row // rows_per_sample, mask=in_rows, other=0.0).to(tl.float32)
        if gamma_ptr is not None:
            x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            d_gamma += x * dx
            dx *= gamma
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    programs = tl.num_programs(0)
    partial_ptrs = partial_ptr + tl.program_id(0) * C + channel
    tl.store(partial_ptrs, tl.sum(d_weight, 0)[None, :], mask=channel < C)
    tl.store(partial_ptrs + programs * C, tl.sum(d_bias, 0)[None, :], mask=channel < C)
    tl.store(partial_ptrs + 2 * programs * C, tl.sum(d_gamma, 0)[None, :], mask=channel < C)


def _tile(C: int, numbers: int) -> dict[str, int]:
    """Rows and columns of a tile of about so many numbers, one row at least, and warps for 8 numbers a thread."""
    columns = triton.next_power_of_2(C)
    rows = max(1, numbers // columns)
    return {"BLOCK_R": rows, "BLOCK_C": columns, "num_warps": max(1, min(16, rows * columns // 256))}


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def add_layer_norm_triton(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual = x.contiguous(), residual.contiguous()
    vectors = _contiguous(weight, bias, layer_scale, drop_path_scale)
    C, rows = x.shape[-1], x.shape[:-1].numel()
    normed, new_residual = torch.empty_like(x), torch.empty_like(residual)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if x.numel():
        tile = _tile(C, FORWARD_TILE)
        with torch.cuda.device_of(x):
            add_layer_norm_forward_kernel[(triton.cdiv(rows, tile["BLOCK_R"]),)](
                x, residual, *vectors, normed, new_residual, mean, rstd, rows, rows // x.shape[0], eps,
                C=C, **tile, enable_fp_fusion=True,
            )  # fmt: skip
    return normed, new_residual, mean, rstd


def add_layer_norm_backward_triton(
    grad_normed: Tensor | None,
    grad_residual: Tensor | None,
    x: Tensor,
    new_residual: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x, new_residual, weight = x.contiguous(), new_residual.contiguous(), weight.contiguous()
    grad_normed, grad_residual, layer_scale, drop_path_scale = _contiguous(
        grad_normed, grad_residual, layer_scale, drop_path_scale
    )
    C, rows = x.shape[-1], x.shape[:-1].numel()
    dx, d_residual = torch.empty_like(x), torch.empty_like(new_residual)
    if x.numel() == 0:
        return dx, d_residual, x.new_zeros((3, C), dtype=torch.float32)
    tile = _tile(C, BACKWARD_TILE)
    row_blocks = triton.cdiv(rows, tile["BLOCK_R"])
    blocks_per_program = triton.cdiv(row_blocks, PROGRAMS)
    programs = triton.cdiv(row_blocks, blocks_per_program)
    partial = x.new_empty((3, programs, C), dtype=torch.float32)
    with torch.cuda.device_of(x):
        add_layer_norm_backward_kernel[(programs,)](
            grad_normed, grad_residual, x, new_residual, mean, rstd, weight, layer_scale, drop_path_scale,
            dx, d_residual, partial, rows, blocks_per_program * tile["BLOCK_R"], rows // x.shape[0],
            C=C, **tile, enable_fp_fusion=True,
        )  # fmt: skip
    return dx, d_residual, partial.sum(1)
