"""add_layer_norm in plain PyTorch: the CPU path, and the oracle of the tests. Half precision is computed in float32."""

import torch
from torch import Tensor


def _wide(tensor: Tensor) -> Tensor:
    """Contiguous, so that sums go in one order whatever the strides were."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()


def _scale(x: Tensor, layer_scale: Tensor | None, drop_path_scale: Tensor | None) -> Tensor | None:
    """What multiplies x, broadcastable to it; None where nothing does."""
    scale = None if layer_scale is None else _wide(layer_scale)
    if drop_path_scale is not None:
        per_sample = _wide(drop_path_scale).view(-1, *[1] * (x.ndim - 1))
        scale = per_sample if scale is None else scale * per_sample
    return scale


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """normed, new_residual, and for backward the rows' mean and 1 / sqrt(variance + eps), both (rows,)."""
    scale = _scale(x, layer_scale, drop_path_scale)
    branch = _wide(x) if scale is None else scale * _wide(x)
    new_residual = (_wide(residual) + branch).to(residual.dtype).contiguous()
    wide = _wide(new_residual)  # rounded first: backward sees the same numbers
    normed, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], _wide(weight), _wide(bias), eps)
    return normed.to(x.dtype), new_residual, mean.flatten(), rstd.flatten()


def add_layer_norm_backward_reference(
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
    """Gradients of x, of the residual, and a float32 (3, C): of weight, bias and layer_scale (0 without one)."""
    wide, C = _wide(new_residual), x.shape[-1]
    d_sum = torch.zeros_like(wide) if grad_residual is None else _wide(grad_residual).clone()
    parameters = wide.new_zeros(3, C)
    if grad_normed is not None:
        statistics = [statistic.view(*x.shape[:-1], 1) for statistic in (mean, rstd)]
        through_norm, d_weight, _ = torch.ops.aten.native_layer_norm_backward(
            _wide(grad_normed), wide, [C], *statistics, _wide(weight), None, [True, True, False]
        )
        d_sum += through_norm
        parameters[0] = d_weight
        parameters[1] = _wide(grad_normed).flatten(0, -2).sum(0)
    scale = _scale(x, layer_scale, drop_path_scale)
    dx = d_sum.clone() if scale is None else scale * d_sum  # an operation's results may not share memory
    if layer_scale is not None:
        dropped = _scale(x, None, drop_path_scale)
        branch = _wide(x) if dropped is None else _wide(x) * dropped
        parameters[2] = (branch * d_sum).flatten(0, -2).sum(0)
    return dx.to(x.dtype).contiguous(), d_sum.to(new_residual.dtype).contiguous(), parameters
