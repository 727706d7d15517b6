"""Attention of sequences of several lengths, packed one after another with no padding between them."""

from itertools import pairwise
from typing import Literal, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastdeit.kernels.autograd import differentiable, only_once
from fastdeit.kernels.backend import autocast, full_precision, use_triton

from . import cpu
from .api import check_kind, offsets_fit, positive_scale


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` within each of several sequences that are packed one after another, as images of several sizes are.

    q, k, v:    (total_tokens, heads, head_dim), of dtypes, head_dims and strides as `attention` takes them.
    cu_seqlens: (sequences + 1,) int32, on the device of q: sequence i has the tokens cu_seqlens[i] up to, and without,
                cu_seqlens[i + 1]; the first is 0, and none is smaller than the one before. Sequences may be empty.
                Tokens past the last belong to no sequence: their output and gradients are 0, their lse is -inf.
    max_seqlen: the length of the longest sequence, which the caller knows, so that nothing waits for the GPU. There it
                only says how many programs to start: a larger one costs time, and so does a smaller one.
    scale:      positive; head_dim**-0.5 when None.
    return_lse: also return the natural log of the sum of exp(logits), (heads, total_tokens), float32.

    Returns the output, contiguous, in the shape and dtype of q. Gradients flow from both outputs, are contiguous and
    deterministic, and cannot be differentiated again. Under autocast the inputs are cast.

    Without the kernels (on the CPU, on GPUs before Ampere or not NVIDIA's) the sequences are computed one by one, for
    which cu_seqlens is read. On the CPU it is checked, too; the kernels take what is out of range for the last token.

    Raises ValueError for what it cannot take.
    """
    q, k, v = autocast(q, k, v)
    if q.ndim != 3 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            "q, k and v must be (total_tokens, heads, head_dim), all the same, but are "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}. Padded batches go to fastdeit.kernels.attention."
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"q, k and v must share dtype and device, but q is {q.dtype} on {q.device} and {name} is "
                f"{tensor.dtype} on {tensor.device}. Convert them with .to(q)."
            )
    check_kind(q)
    total, heads, head_dim = q.shape
    if not offsets_fit(total, heads, head_dim):
        raise ValueError(f"{total} tokens of {heads} x {head_dim} numbers are too many for one call. Make two of them.")
    if (
        cu_seqlens.ndim != 1 or not len(cu_seqlens) or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != q.device
    ):  # fmt: skip
        raise ValueError(
            f"cu_seqlens must be (sequences + 1,) int32 on {q.device}, but is {tuple(cu_seqlens.shape)} "
            f"{cu_seqlens.dtype} on {cu_seqlens.device}. Of lengths it is made by "
            "F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))."
        )
    if isinstance(max_seqlen, Tensor) or max_seqlen < 0:
        raise ValueError(f"max_seqlen must be a number of Python's, 0 or more, but is {max_seqlen!r}.")
    out, lse = _attend(q, k, v, cu_seqlens, max_seqlen, positive_scale(scale, q))
    return (out, lse) if return_lse else out


def _sequences(cu_seqlens: Tensor, total: int, max_seqlen: int) -> list[slice]:
    """Those that have tokens. Reads cu_seqlens."""
    edges = cu_seqlens.tolist()
    lengths = [after - before for before, after in pairwise(edges)]
    if edges[0] != 0 or edges[-1] > total or min(lengths, default=0) < 0 or max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"cu_seqlens must begin with 0, never fall, end at {total}, the number of tokens, or before, and no "
            f"sequence may have more than max_seqlen = {max_seqlen}, but it is {edges}."
        )
    return [slice(first, first + length) for first, length in zip(edges, lengths) if length]


def _runs_kernels(q: Tensor, cu_seqlens: Tensor) -> bool:
    return q.numel() > 0 and len(cu_seqlens) > 1 and use_triton(q) and q.dtype != torch.float64


def _lse_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@torch.library.custom_op("fastdeit::attention_varlen", mutates_args=())
def _attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=_lse_dtype(q), device=q.device)
    if _runs_kernels(q, cu_seqlens):
        from .triton_varlen import varlen_forward

        varlen_forward(q, k, v, cu_seqlens, max_seqlen, scale, out, lse)
        return out, lse
    with full_precision(q):
        for part in _sequences(cu_seqlens, len(q), max_seqlen) if q.numel() else ():
            result, sums = cpu.attention_forward(q[None, part], k[None, part], v[None, part], scale)
            out[part], lse[:, part] = result[0].to(q.dtype), sums[0]
    return out, lse


@_attention_varlen.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, scale):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=_lse_dtype(q))


@torch.library.custom_op("fastdeit::attention_varlen_backward", mutates_args=())
def _attention_varlen_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, out: Tensor, lse: Tensor, max_seqlen: int,
    scale: float, grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.zeros(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    if _runs_kernels(q, cu_seqlens):
        from .triton_varlen import varlen_backward

        varlen_backward(grad_out, q, k, v, cu_seqlens, out, lse, max_seqlen, scale, grad_lse, (dq, dk, dv))
        return dq, dk, dv
    with full_precision(q):
        for part in _sequences(cu_seqlens, len(q), max_seqlen) if q.numel() else ():
            values = cpu.attention_backward(
                grad_out[None, part], q[None, part], k[None, part], v[None, part], out[None, part], lse[None, :, part],
                scale, None if grad_lse is None else grad_lse[None, :, part],
            )  # fmt: skip
            for grad, value in zip((dq, dk, dv), values):
                grad[part] = value[0].to(q.dtype)
    return dq, dk, dv


@_attention_varlen_backward.register_fake
def _(grad_out, q, k, v, cu_seqlens, out, lse, max_seqlen, scale, grad_lse):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.max_seqlen, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, grad_lse):
    *inputs, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = _backward_once(grad_out, *inputs, out, lse, ctx.max_seqlen, ctx.scale, grad_lse)
    return *grads, None, None, None


_ops = torch.ops.fastdeit
_attend = differentiable("attention_varlen", _ops.attention_varlen.default, _save, _differentiate)
_backward_once = only_once("attention_varlen", _ops.attention_varlen_backward.default)


# FLOP, of the sequences' own lengths, which are read.


def _products(count: int, q: Tensor, cu_seqlens: Tensor) -> int:
    return count * 2 * q.shape[1] * q.shape[2] * int(cu_seqlens.long().diff().square().sum())


@register_flop_formula(_ops.attention_varlen, get_raw=True)
def _(q, k, v, cu_seqlens, *_, **__) -> int:
    return _products(2, q, cu_seqlens)


@register_flop_formula(_ops.attention_varlen_backward, get_raw=True)
def _(grad_out, q, k, v, cu_seqlens, *_, **__) -> int:
    return _products(5, q, cu_seqlens)
