"""The bias and the GELU of a transformer's MLP, in one pass forward and one backward."""

import torch
from torch import Tensor

from fastdeit.kernels.autograd import differentiable, only_once
from fastdeit.kernels.backend import use_triton

from .reference import bias_gelu_backward_reference, bias_gelu_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) with the exact (erf) GELU of ViT and DeiT, for a Linear whose bias was left off.

    Backward keeps x and the bias alone, and sums the bias' gradient in an order that depends on the shape only, so that
    it has the same bits every time. GELU: Hendrycks and Gimpel, arXiv:1606.08415, the form x Phi(x).

    Args:
        x: (..., C) floating point, two dimensions or more. Made contiguous if it is not.
        bias: (C,), of any floating dtype; the sum is in float32.

    Returns: the shape and dtype of x, contiguous.

    Raises: ValueError for shapes or devices that do not fit, or dtypes that are not floating point.
    """
    if x.ndim < 2 or x.dtype not in DTYPES or bias.dtype not in DTYPES:
        raise ValueError(f"x must be (..., channels) of float32, float16 or bfloat16, got {tuple(x.shape)} {x.dtype}")
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"bias must be ({x.shape[-1]},), one number a channel of x, got {tuple(bias.shape)}")
    if bias.device != x.device:
        raise ValueError(f"bias is on {bias.device} and x on {x.device}: move them to one device")
    return _apply(x, bias)


@torch.library.custom_op("fastdeit::bias_gelu", mutates_args=())
def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    if use_triton(x) and x.dtype != torch.float64:
        from .triton_kernels import bias_gelu_triton

        return bias_gelu_triton(x, bias)
    return bias_gelu_reference(x, bias)


@_bias_gelu.register_fake
def _(x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("fastdeit::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    if use_triton(x) and x.dtype != torch.float64:
        from .triton_kernels import bias_gelu_backward_triton

        return bias_gelu_backward_triton(grad, x, bias)
    return bias_gelu_backward_reference(grad, x, bias)


@_bias_gelu_backward.register_fake
def _(grad, x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return _backward_once(grad, *ctx.saved_tensors)


_apply = differentiable("bias_gelu", torch.ops.fastdeit.bias_gelu.default, _setup_context, _backward)
_backward_once = only_once("bias_gelu", torch.ops.fastdeit.bias_gelu_backward.default)
