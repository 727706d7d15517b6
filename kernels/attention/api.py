"""Exact softmax attention for vision transformers: no mask, no dropout, the same tokens on both sides.

The kernels read q, k and v where they lie, which for the packed projection means no permute and no copy, and write
the gradient in the same packed layout.
"""

import math

import torch
from torch import Tensor

from ..backend import full_precision, use_triton
from . import cpu

HEAD_DIMS = (32, 64, 80, 96, 128)
MAX_TOKENS = 4096
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale) v for every batch entry and head (Vaswani et al. 2017, equation 1).

    q, k, v:    (batch, tokens, heads, head_dim), one shape, one dtype of float16, bfloat16 and float32 (on the CPU
                float64 too), any strides; head_dim 32, 64, 80, 96 or 128; 1 to 4096 tokens. Read in place when the
                last dimension is contiguous.
    scale:      positive; head_dim**-0.5 when None.
    return_lse: also return the natural log of the sum of exp(logits), (batch, heads, tokens), float32.

    Returns the output, (batch, tokens, heads, head_dim), contiguous, in the dtype of q. Accumulates in float32.
    Gradients flow from both outputs, are deterministic, and cannot be differentiated again. Under autocast the inputs
    are cast, as scaled_dot_product_attention's are. Float32 on a GPU uses TF32 where PyTorch's matmul may.

    Raises ValueError for what the kernels cannot take, and says what can be done instead.
    """
    q, k, v = _autocast(q, k, v)
    if q.ndim != 4:
        raise ValueError(f"q, k and v must be (batch, tokens, heads, head_dim), but q has the shape {tuple(q.shape)}.")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape:
            raise ValueError(
                f"q, k and v must have one shape, but q is {tuple(q.shape)} and {name} is {tuple(tensor.shape)}. For "
                "cross attention or grouped heads use torch.nn.functional.scaled_dot_product_attention."
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"q, k and v must share dtype and device, but q is {q.dtype} on {q.device} and {name} is "
                f"{tensor.dtype} on {tensor.device}. Convert them with .to(q)."
            )
    _check(q)
    out, lse = torch.ops.fastdeit.attention(q, k, v, _scale(scale, q))
    return (out, lse) if return_lse else out


def attention_qkvpacked(
    qkv: Tensor, *, scale: float | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` straight from the qkv projection, `qkv_linear(x).view(batch, tokens, 3, heads, head_dim)`.

    qkv: (batch, tokens, 3, heads, head_dim); its gradient comes back in this shape, contiguous. Everything else is as
    in `attention`.
    """
    (qkv,) = _autocast(qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"qkv must be (batch, tokens, 3, heads, head_dim), but its shape is {tuple(qkv.shape)}. From a projection "
            "of width 3 * dim: qkv.view(batch, tokens, 3, heads, dim // heads)."
        )
    _check(qkv)
    out, lse = torch.ops.fastdeit.attention_qkvpacked(qkv, _scale(scale, qkv))
    return (out, lse) if return_lse else out


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype in DTYPES else x for x in tensors)


def _scale(scale: float | None, x: Tensor) -> float:
    scale = x.shape[-1] ** -0.5 if scale is None else float(scale)
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, but is {scale}. Move a sign into q or k.")
    return scale


def _check(x: Tensor):
    tokens, head_dim = x.shape[1], x.shape[-1]
    if x.dtype not in DTYPES and not (x.dtype == torch.float64 and x.device.type == "cpu"):
        raise ValueError(f"attention takes float16, bfloat16 and float32 on {x.device.type}, not {x.dtype}.")
    if head_dim not in HEAD_DIMS:
        raise ValueError(
            f"attention supports head_dim {', '.join(map(str, HEAD_DIMS))}, not {head_dim}. Use "
            "torch.nn.functional.scaled_dot_product_attention for this model."
        )
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"attention takes 1 to {MAX_TOKENS} tokens, not {tokens}.")


# The operators return fresh contiguous tensors and mutate nothing, so that torch.compile may reorder them.


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=_lse_dtype(q), device=q.device)
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


def _backward(grad_out, q, k, v, out, lse, scale, grad_lse, grads: tuple[Tensor, Tensor, Tensor]):
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
    batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=_lse_dtype(q))


@torch.library.custom_op("fastdeit::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    _backward(grad_out, q, k, v, out, lse, scale, grad_lse, grads)
    return grads


@_attention_backward.register_fake
def _(grad_out, q, k, v, out, lse, scale, grad_lse):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


@torch.library.custom_op("fastdeit::attention_qkvpacked", mutates_args=())
def _attention_qkvpacked(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _forward(*qkv.unbind(2), scale)


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
    _backward(grad_out, *qkv.unbind(2), out, lse, scale, grad_lse, grad_qkv.unbind(2))
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
    backward = _attention_backward if len(inputs) == 3 else _attention_qkvpacked_backward
    grads = backward(grad_out, *inputs, out, lse, ctx.scale, grad_lse)
    return *(grads if len(inputs) == 3 else (grads,)), None


def _refuse_second_derivative(ctx, *grads):
    raise RuntimeError(
        "fastdeit.kernels.attention cannot be differentiated twice (a backward pass with create_graph=True, a gradient "
        "penalty, a Hessian). Use torch.nn.functional.scaled_dot_product_attention under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH) there."
    )


_attention.register_autograd(_differentiate, setup_context=_save)
_attention_qkvpacked.register_autograd(_differentiate, setup_context=_save)
_attention_backward.register_autograd(_refuse_second_derivative)
_attention_qkvpacked_backward.register_autograd(_refuse_second_derivative)
