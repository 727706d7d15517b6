"""What stands between two branches of a prenorm transformer: LayerScale, DropPath, residual sum and LayerNorm."""

import torch
from torch import Tensor

from fastdeit.kernels.autograd import differentiable, only_once
from fastdeit.kernels.backend import use_triton

from .reference import add_layer_norm_backward_reference, add_layer_norm_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Adds a branch to the residual stream and normalises the sum for the next branch, in one pass.

    new_residual = residual + drop_path_scale * layer_scale * x
    normed       = LayerNorm(new_residual) * weight + bias

    The arithmetic is in float32; new_residual is rounded to its dtype before it is normalised, as separate operations
    would. Sums over rows in backward go in an order that depends on the shape only: the same bits every time. Sources:
    LayerScale, arXiv:2103.17239, equation 4; DropPath (stochastic depth), arXiv:1603.09382, with the scale
    0 or 1 / keep_prob as timm draws it; LayerNorm, arXiv:1607.06450.

    Args:
        x: (B, ..., C) float32, float16 or bfloat16, the branch's output.
        residual: the shape of x; the dtype may be another (a float32 stream beside bfloat16 branches).
        weight, bias: (C,), the LayerNorm's.
        layer_scale: (C,), or None for 1.
        drop_path_scale: (B,), one factor a sample, or None for 1. It gets no gradient.
        eps: added to the variance.

    Returns:
        normed: the shape and dtype of x, contiguous.
        new_residual: the shape of x, the dtype of residual, contiguous.

    Raises: ValueError for shapes, dtypes or devices that do not fit.
    """
    _check(x, residual, weight, bias, layer_scale, drop_path_scale)
    return _apply(x, residual, weight, bias, layer_scale, drop_path_scale, eps)[:2]


@torch.library.custom_op("fastdeit::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (x, residual, weight, bias, layer_scale, drop_path_scale, eps)
    if use_triton(x) and x.dtype != torch.float64:
        from .triton_kernels import add_layer_norm_triton

        return add_layer_norm_triton(*arguments)
    return add_layer_norm_reference(*arguments)


@_add_layer_norm.register_fake
def _(x, residual, weight, bias, layer_scale, drop_path_scale, eps):
    statistics = x.new_empty(x.shape[:-1].numel(), dtype=_statistics_dtype(residual))
    return _empty(x), _empty(residual), statistics, torch.empty_like(statistics)


@torch.library.custom_op("fastdeit::add_layer_norm_backward", mutates_args=())
def _add_layer_norm_backward(
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
    arguments = (grad_normed, grad_residual, x, new_residual, mean, rstd, weight, layer_scale, drop_path_scale)
    if use_triton(x) and x.dtype != torch.float64:
        from .triton_kernels import add_layer_norm_backward_triton

        return add_layer_norm_backward_triton(*arguments)
    return add_layer_norm_backward_reference(*arguments)


@_add_layer_norm_backward.register_fake
def _(grad_normed, grad_residual, x, new_residual, mean, rstd, weight, layer_scale, drop_path_scale):
    return _empty(x), _empty(new_residual), mean.new_empty(3, x.shape[-1])


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _statistics_dtype(residual: Tensor) -> torch.dtype:
    return torch.float64 if residual.dtype == torch.float64 else torch.float32


def _setup_context(ctx, inputs, output):
    x, _, weight, bias, layer_scale, drop_path_scale, _ = inputs
    _, new_residual, mean, rstd = output
    ctx.set_materialize_grads(False)  # the last norm's residual goes nowhere: nothing to read, rather than zeros
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, new_residual, mean, rstd, weight, layer_scale, drop_path_scale)
    ctx.bias_dtype = bias.dtype


def _backward(ctx, grad_normed, grad_residual, _mean, _rstd):
    if grad_normed is None and grad_residual is None:
        return (None,) * 7
    weight, layer_scale = ctx.saved_tensors[4:6]
    dx, d_residual, parameters = _backward_once(grad_normed, grad_residual, *ctx.saved_tensors)
    d_weight = None if grad_normed is None else parameters[0].to(weight.dtype)
    d_bias = None if grad_normed is None else parameters[1].to(ctx.bias_dtype)
    d_layer_scale = None if layer_scale is None else parameters[2].to(layer_scale.dtype)
    return dx, d_residual, d_weight, d_bias, d_layer_scale, None, None


_apply = differentiable("add_layer_norm", torch.ops.fastdeit.add_layer_norm.default, _setup_context, _backward)
_backward_once = only_once("add_layer_norm", torch.ops.fastdeit.add_layer_norm_backward.default)


def _check(x, residual, weight, bias, layer_scale, drop_path_scale) -> None:
    if x.ndim < 2 or x.dtype not in DTYPES or residual.dtype not in DTYPES:
        raise ValueError(
            f"x and residual must be (batch, ..., channels) of float32, float16 or bfloat16, got {tuple(x.shape)} "
            f"{x.dtype} and {residual.dtype}"
        )
    if residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    channels, batch = (x.shape[-1],), (x.shape[0],)
    expected = {"weight": channels, "bias": channels, "layer_scale": channels, "drop_path_scale": batch}
    given = {"weight": weight, "bias": bias, "layer_scale": layer_scale, "drop_path_scale": drop_path_scale}
    for name, shape in expected.items():
        if given[name] is not None and tuple(given[name].shape) != shape:
            raise ValueError(f"{name} must be {shape} for x of {tuple(x.shape)}, got {tuple(given[name].shape)}")
    for name, tensor in {"residual": residual, **given}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device")
