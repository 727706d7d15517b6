"""Exact softmax attention for vision transformers: no dropout; as many keys as queries, or others; an additive bias.

The kernels read q, k and v where they lie, which for the packed projection means no permute and no copy, and write
the gradient in the same packed layout.
"""

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from fastdeit.kernels.autograd import differentiable, only_once
from fastdeit.kernels.backend import autocast, full_precision, left_to_pytorch, use_triton

from . import cpu, vmap
from .bias import attend_with_bias, check_bias, pytorch_attention_with_bias

HEAD_DIMS = tuple(range(16, 129, 8))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale + bias) v for every batch entry and head (Vaswani et al. 2017, equation 1).

    q:          (batch, queries, heads, head_dim) in float16, bfloat16 or float32 (on the CPU float64 too), any strides;
                head_dim a multiple of 8 from 16 to 128. Read in place when the last dimension is contiguous.
    k, v:       (batch, keys, heads, head_dim), as q; there may be more or fewer keys than queries (cross attention,
                attention pooling, a class token that attends to all).
    bias:       added to the scaled logits: (heads or 1, queries, keys), one for all of the batch (relative positions,
                BEiT), or (period, heads or 1, queries, keys), of which entry b of the batch gets bias[b % period]: one
                for each entry, or Swin's, one for each window of an image. Floating point, of any dtype. It has a
                gradient if it asks for one. -inf masks a key; a row that has no other attends to nothing and returns
                zeros.
    scale:      positive; head_dim**-0.5 when None.
    return_lse: also return the natural log of the sum of exp(logits), (batch, heads, queries), float32.

    Returns the output, (batch, queries, heads, head_dim), contiguous, in the dtype of q. Accumulates in float32.
    Gradients flow from both outputs, are deterministic, and cannot be differentiated again. Under autocast the inputs
    are cast, as scaled_dot_product_attention's are.

    Where the kernels have nothing to offer, scaled_dot_product_attention is called, unless lse is wanted too: for
    float32 on a GPU (unless PyTorch's matmul may use TF32, which the kernels then do too), and on GPUs before Ampere or
    not NVIDIA's.

    Raises ValueError for what the kernels cannot take, and says what can be done instead.
    """
    q, k, v = autocast(q, k, v)
    if q.ndim != 4:
        raise ValueError(f"q, k and v must be (batch, tokens, heads, head_dim), but q has the shape {tuple(q.shape)}.")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.ndim != 4 or tensor.shape[::2] != q.shape[::2] or tensor.shape[3] != q.shape[3]:
            raise ValueError(
                f"q, k and v may differ in their tokens only, but q is {tuple(q.shape)} and {name} is "
                f"{tuple(tensor.shape)}. For grouped heads use torch.nn.functional.scaled_dot_product_attention."
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"q, k and v must share dtype and device, but q is {q.dtype} on {q.device} and {name} is "
                f"{tensor.dtype} on {tensor.device}. Convert them with .to(q)."
            )
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same tokens, but k is {tuple(k.shape)} and v is {tuple(v.shape)}.")
    _check(q)
    _check(k)
    scale = positive_scale(scale, q)
    if bias is not None:
        return _with_bias(q, k, v, bias, scale, return_lse)
    if not return_lse and left_to_pytorch(q.device, q.dtype):
        return _pytorch_attention(q, k, v, scale)
    out, lse = _attend(q, k, v, scale)
    return (out, lse) if return_lse else out


@overload
def attention_qkvpacked(
    qkv: Tensor, *, bias: Tensor | None = None, scale: float | None = None, return_lse: Literal[False] = False
) -> Tensor: ...
@overload
def attention_qkvpacked(
    qkv: Tensor, *, bias: Tensor | None = None, scale: float | None = None, return_lse: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def attention_qkvpacked(
    qkv: Tensor, *, bias: Tensor | None = None, scale: float | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` straight from the qkv projection, `qkv_linear(x).view(batch, tokens, 3, heads, head_dim)`.

    qkv: (batch, tokens, 3, heads, head_dim); its gradient comes back in this shape, contiguous. With a bias it is put
    together by a copy. Everything else is as in `attention`.
    """
    (qkv,) = autocast(qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"qkv must be (batch, tokens, 3, heads, head_dim), but its shape is {tuple(qkv.shape)}. From a projection "
            "of width 3 * dim: qkv.view(batch, tokens, 3, heads, dim // heads)."
        )
    _check(qkv)
    scale = positive_scale(scale, qkv)
    if bias is not None:
        q, k, v = qkv.unbind(2)
        return _with_bias(q, k, v, bias, scale, return_lse)
    if not return_lse and left_to_pytorch(qkv.device, qkv.dtype):
        q, k, v = qkv.unbind(2)
        return _pytorch_attention(q, k, v, scale)
    out, lse = _attend_packed(qkv, scale)
    return (out, lse) if return_lse else out


def _with_bias(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    bias = check_bias(bias, q, k)
    if not return_lse and left_to_pytorch(q.device, q.dtype):
        return pytorch_attention_with_bias(q, k, v, bias, scale)
    out, lse = attend_with_bias(q, k, v, bias, scale)
    return (out, lse) if return_lse else out


def _pytorch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()


def positive_scale(scale: float | None, x: Tensor) -> float:
    scale = x.shape[-1] ** -0.5 if scale is None else float(scale)
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, but is {scale}. Move a sign into q or k.")
    return scale


def _check(x: Tensor) -> None:
    check_kind(x)
    tokens, heads, head_dim = x.shape[1], *x.shape[-2:]
    if tokens < 1 or not offsets_fit(tokens, heads, head_dim):
        raise ValueError(f"attention takes 1 to {2**31 // max(1, 3 * heads * head_dim) - 256} tokens, not {tokens}.")


def check_kind(x: Tensor) -> None:
    """Refuses a dtype and a head_dim, x's last dimension, that attention does not take."""
    head_dim = x.shape[-1]
    if x.dtype not in DTYPES and not (x.dtype == torch.float64 and x.device.type == "cpu"):
        raise ValueError(f"attention takes float16, bfloat16 and float32 on {x.device.type}, not {x.dtype}.")
    if head_dim not in HEAD_DIMS:
        raise ValueError(
            f"attention supports head_dim 16 to 128 in steps of 8, not {head_dim}. Use "
            "torch.nn.functional.scaled_dot_product_attention for this model."
        )


def offsets_fit(tokens: int, heads: int, head_dim: int) -> bool:
    """Whether offsets into one batch entry of a packed gradient, and a tile beyond its end, fit into 32 bits."""
    return (tokens + 256) * 3 * heads * head_dim <= 2**31


# The operators return fresh contiguous tensors and mutate nothing, so that torch.compile may reorder them.


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=_lse_dtype(q), device=q.device)
    if q.numel() == 0:  # nothing to launch, and PyTorch's own operator dies of no heads
        pass
    elif use_triton(q) and q.dtype in DTYPES:
        from .triton_forward import attention_forward

        attention_forward(q, k, v, out, lse, scale)
    else:
        with full_precision(q):
            for result, value in zip((out, lse), cpu.attention_forward(q, k, v, scale)):
                result.copy_(value)
    return out, lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    grad_lse: Tensor | None,
    grads: Sequence[Tensor],
) -> None:
    """Writes the gradients of q, k and v into `grads`."""
    if q.numel() == 0:
        pass
    elif use_triton(q) and q.dtype in DTYPES:
        from .triton_backward import attention_backward

        attention_backward(grad_out, q, k, v, out, lse, scale, grad_lse, grads)
    else:
        with full_precision(q):
            for grad, value in zip(grads, cpu.attention_backward(grad_out, q, k, v, out, lse, scale, grad_lse)):
                grad.copy_(value)


def _lse_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("fastdeit::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, scale)


@_attention.register_fake
def _(q, k, v, scale):
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=_lse_dtype(q))


@torch.library.custom_op("fastdeit::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _backward(grad_out, q, k, v, out, lse, scale, grad_lse, (dq, dk, dv))
    return dq, dk, dv


@_attention_backward.register_fake
def _(grad_out, q, k, v, out, lse, scale, grad_lse):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.custom_op("fastdeit::attention_qkvpacked", mutates_args=())
def _attention_qkvpacked(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return _forward(q, k, v, scale)


@_attention_qkvpacked.register_fake
def _(qkv, scale):
    batch, tokens, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty((batch, heads, tokens), dtype=_lse_dtype(qkv))
    return qkv.new_empty((batch, tokens, heads, head_dim)), lse


@torch.library.custom_op("fastdeit::attention_qkvpacked_backward", mutates_args=())
def _attention_qkvpacked_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, grad_lse: Tensor | None
) -> Tensor:
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    q, k, v = qkv.unbind(2)
    _backward(grad_out, q, k, v, out, lse, scale, grad_lse, grad_qkv.unbind(2))
    return grad_qkv


@_attention_qkvpacked_backward.register_fake
def _(grad_out, qkv, out, lse, scale, grad_lse):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, grad_lse):
    *inputs, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    backward = _backward_once if len(inputs) == 3 else _backward_packed_once
    grads = backward(grad_out, *inputs, out, lse, ctx.scale, grad_lse)
    return *(grads if len(inputs) == 3 else (grads,)), None


_ops = torch.ops.fastdeit
_attend = differentiable("attention", _ops.attention.default, _save, _differentiate)
_attend_packed = differentiable("attention_qkvpacked", _ops.attention_qkvpacked.default, _save, _differentiate)
_backward_once = only_once("attention", _ops.attention_backward.default)
_backward_packed_once = only_once("attention_qkvpacked", _ops.attention_qkvpacked_backward.default)


for _operator in (_attention, _attention_backward, _attention_qkvpacked, _attention_qkvpacked_backward):
    vmap.in_batch(_operator)


# FLOP as FlopCounterMode counts those of scaled_dot_product_attention.


def _products(count: int, q_shape, k_shape) -> int:
    batch, queries, heads, head_dim = q_shape
    return count * 2 * batch * heads * queries * k_shape[1] * head_dim


@register_flop_formula(_ops.attention)
def _(q, k, *_, **__) -> int:
    return _products(2, q, k)


@register_flop_formula(_ops.attention_backward)
def _(grad_out, q, k, *_, **__) -> int:
    return _products(5, q, k)


@register_flop_formula(_ops.attention_qkvpacked)
def _(qkv, *_, **__) -> int:
    return _products(2, *2 * ((*qkv[:2], *qkv[3:]),))


@register_flop_formula(_ops.attention_qkvpacked_backward)
def _(grad_out, *_, **__) -> int:
    return _products(5, grad_out, grad_out)
