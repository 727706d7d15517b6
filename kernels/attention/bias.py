"""Attention with an additive bias: its checks, its operators, and plain PyTorch where no kernel runs."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from fastdeit.kernels.autograd import differentiable, only_once
from fastdeit.kernels.backend import full_precision, use_triton

from . import cpu, reference, vmap


def check_bias(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The bias with four dimensions, (period, heads or 1, queries, keys)."""
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    wide = bias.unsqueeze(0) if bias.ndim == 3 else bias
    if (
        wide.ndim != 4
        or wide.shape[1] not in (1, heads)
        or wide.shape[2:] != (queries, keys)
        or not 1 <= len(wide) <= max(batch, 1)
        or batch % len(wide)
    ):
        raise ValueError(
            f"bias must be (heads or 1, queries, keys), here ({heads}, {queries}, {keys}), or have a number of batch "
            f"entries before it that divides {batch}, but its shape is {tuple(bias.shape)}. Broadcast it with "
            "bias.expand(...)."
        )
    if bias.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or bias.device != q.device:
        raise ValueError(
            f"bias must be floating point and on {q.device}, but is {bias.dtype} on {bias.device}. A mask becomes one "
            "by torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float('-inf'))."
        )
    return wide


def pytorch_attention_with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """By scaled_dot_product_attention."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bias = _of_each_entry(bias, len(q)).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2).contiguous()


def _of_each_entry(bias: Tensor, batch: int) -> Tensor:
    """Entry b of the batch has bias[b % period]."""
    return bias if len(bias) in (1, batch) else bias.repeat(batch // len(bias), 1, 1, 1)


def _statistics(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@torch.library.custom_op("fastdeit::attention_bias", mutates_args=())
def _attention_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if q.numel() and use_triton(q) and q.dtype != torch.float64:
        from .triton_bias import bias_forward

        return bias_forward(q, k, v, bias, scale)
    with full_precision(q):
        out, lse = cpu.attention_forward(q, k, v, scale, _of_each_entry(bias, len(q)))
    return out.to(q.dtype).contiguous(), lse


@_attention_bias.register_fake
def _(q, k, v, bias, scale):
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=_statistics(q))


@torch.library.custom_op("fastdeit::attention_bias_backward", mutates_args=())
def _attention_bias_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, lse: Tensor, scale: float,
    grad_lse: Tensor | None, with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The last is empty unless with_bias."""
    if q.numel() and use_triton(q) and q.dtype != torch.float64:
        from .triton_bias import bias_backward

        dq, dk, dv, dbias = bias_backward(grad_out, q, k, v, bias, out, lse, scale, grad_lse, with_bias)
        return dq, dk, dv, bias.new_empty(0) if dbias is None else dbias
    full, arguments, dbias = _of_each_entry(bias, len(q)), (out, lse, scale, grad_lse), bias.new_empty(0)
    with full_precision(q):
        if with_bias:
            *grads, dscores = reference.attention_bias_backward(grad_out, q, k, v, full, *arguments)
            shared = dscores.sum(1, keepdim=True) if bias.shape[1] == 1 else dscores
            dbias = shared.unflatten(0, (-1, len(bias))).sum(0).to(bias.dtype)
        else:
            grads = list(cpu.attention_backward(grad_out, q, k, v, *arguments, full))
    dq, dk, dv = (grad.to(q.dtype).contiguous() for grad in grads)
    return dq, dk, dv, dbias


@_attention_bias_backward.register_fake
def _(grad_out, q, k, v, bias, out, lse, scale, grad_lse, with_bias):
    dbias = bias.new_empty(bias.shape if with_bias else 0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, grad_lse):
    *inputs, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    with_bias = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = _backward_once(grad_out, *inputs, out, lse, ctx.scale, grad_lse, with_bias)
    return dq, dk, dv, dbias if with_bias else None, None


attend_with_bias = differentiable("attention", torch.ops.fastdeit.attention_bias.default, _save, _differentiate)
_backward_once = only_once("attention", torch.ops.fastdeit.attention_bias_backward.default)


vmap.in_batch(_attention_bias, bias=3)
vmap.in_batch(_attention_bias_backward, bias=4)


@register_flop_formula(torch.ops.fastdeit.attention_bias)
def _(q, k, *_, **__) -> int:
    batch, queries, heads, head_dim = q
    return 4 * batch * heads * queries * k[1] * head_dim


@register_flop_formula(torch.ops.fastdeit.attention_bias_backward)
def _(grad_out, q, k, *_, **__) -> int:
    batch, queries, heads, head_dim = q
    return 10 * batch * heads * queries * k[1] * head_dim
