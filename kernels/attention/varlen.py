"""Attention of sequences of several lengths, packed one after another with no padding between them."""

from itertools import pairwise
from typing import Literal, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastdeit.kernels.autograd import differentiable, only_once
from fastdeit.kernels.backend import autocast, full_precision, use_triton

from . import cpu, vmap
from .api import check_kind, offsets_fit, positive_scale


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
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
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
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
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` within each of several sequences that are packed one after another, as images of several sizes are.

    q:          (total_tokens, heads, head_dim), of dtypes, head_dims and strides as `attention` takes them.
    k, v:       as q; with cu_seqlens_k (total_keys, heads, head_dim).
    cu_seqlens: (sequences + 1,) int32, on the device of q: sequence i has the tokens cu_seqlens[i] up to, and without,
                cu_seqlens[i + 1]; the first is 0, and none is smaller than the one before. Sequences may be empty.
                Tokens past the last belong to no sequence: their output and gradients are 0, their lse is -inf.
    max_seqlen: the length of the longest sequence, which the caller knows, so that nothing waits for the GPU. There it
                only says how many programs to start: a larger one costs time, and so does a smaller one.
    cu_seqlens_k, max_seqlen_k: those of the keys where they are others than the queries (cross attention, pooling): as
                many sequences, each of which attends to the keys of the same number. Queries without a key get zeros,
                and an lse of -inf.
    scale:      positive; head_dim**-0.5 when None.
    return_lse: also return the natural log of the sum of exp(logits), (heads, total_tokens), float32.

    Returns the output, contiguous, in the shape and dtype of q. Gradients flow from both outputs, are contiguous and
    deterministic, and cannot be differentiated again. Under autocast the inputs are cast.

    Without the kernels (on the CPU, on GPUs before Ampere or not NVIDIA's) the sequences are computed one by one, for
    which cu_seqlens is read. On the CPU it is checked, too; the kernels take what is out of range for the last token.

    Raises ValueError for what it cannot take.
    """
    q, k, v = autocast(q, k, v)
    if (cu_seqlens_k is None) != (max_seqlen_k is None):
        raise ValueError("cu_seqlens_k and max_seqlen_k belong together: give both, or neither where k is as q.")
    same = slice(0 if cu_seqlens_k is None else 1, None)  # of the shapes
    if q.ndim != 3 or k.ndim != 3 or k.shape[same] != q.shape[same] or v.shape != k.shape:
        raise ValueError(
            "q, k and v must be (total_tokens, heads, head_dim), all the same unless cu_seqlens_k says where keys are, "
            f"but are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}. Padded batches go to "
            "fastdeit.kernels.attention."
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"q, k and v must share dtype and device, but q is {q.dtype} on {q.device} and {name} is "
                f"{tensor.dtype} on {tensor.device}. Convert them with .to(q)."
            )
    check_kind(q)
    total, heads, head_dim = max(len(q), len(k)), *q.shape[1:]
    if not offsets_fit(total, heads, head_dim):
        raise ValueError(f"{total} tokens of {heads} x {head_dim} numbers are too many for one call. Make two of them.")
    _check_edges("", cu_seqlens, max_seqlen, q)
    if cu_seqlens_k is not None and max_seqlen_k is not None:
        _check_edges("_k", cu_seqlens_k, max_seqlen_k, q)
        if cu_seqlens_k.shape != cu_seqlens.shape:
            raise ValueError(
                f"cu_seqlens_k must tell of as many sequences as cu_seqlens, {len(cu_seqlens) - 1}, but tells of "
                f"{len(cu_seqlens_k) - 1}. One without keys is empty: it ends where it begins."
            )
    longest_k = max_seqlen if max_seqlen_k is None else max_seqlen_k
    out, lse = _attend(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, longest_k, positive_scale(scale, q))
    return (out, lse) if return_lse else out


def _check_edges(suffix: str, edges: Tensor, longest: int, q: Tensor) -> None:
    if edges.ndim != 1 or not len(edges) or edges.dtype != torch.int32 or edges.device != q.device:
        raise ValueError(
            f"cu_seqlens{suffix} must be (sequences + 1,) int32 on {q.device}, but is {tuple(edges.shape)} "
            f"{edges.dtype} on {edges.device}. Of lengths it is made by F.pad(lengths.cumsum(0, dtype=torch.int32), "
            "(1, 0))."
        )
    if isinstance(longest, Tensor) or longest < 0:
        raise ValueError(f"max_seqlen{suffix} must be a number of Python's, 0 or more, but is {longest!r}.")


def _sequences(suffix: str, edges: Tensor, total: int, longest: int) -> list[slice]:
    """Reads cu_seqlens."""
    numbers = edges.tolist()
    lengths = [after - before for before, after in pairwise(numbers)]
    if numbers[0] != 0 or numbers[-1] > total or min(lengths, default=0) < 0 or max(lengths, default=0) > longest:
        raise ValueError(
            f"cu_seqlens{suffix} must begin with 0, never fall, end at {total}, the number of tokens, or before, and "
            f"no sequence may have more than max_seqlen{suffix} = {longest}, but it is {numbers}."
        )
    return [slice(first, last) for first, last in pairwise(numbers)]


def _pairs(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor | None, longest_q: int, longest_k: int) -> list[tuple]:
    """Of queries and keys, where there are both."""
    of_q = _sequences("", cu_q, len(q), longest_q)
    of_k = of_q if cu_k is None else _sequences("_k", cu_k, len(k), longest_k)
    if not q.shape[1]:
        return []
    return [(i, j) for i, j in zip(of_q, of_k) if i.start < i.stop and j.start < j.stop]


def _runs_kernels(q: Tensor, k: Tensor, cu_q: Tensor) -> bool:
    return q.numel() > 0 and k.numel() > 0 and len(cu_q) > 1 and use_triton(q) and q.dtype != torch.float64


def _lse_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@torch.library.custom_op("fastdeit::attention_varlen", mutates_args=())
def _attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, longest_q: int, longest_k: int, scale: float
) -> tuple[Tensor, Tensor]:
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=_lse_dtype(q), device=q.device)
    if _runs_kernels(q, k, cu_q):
        from .triton_varlen import varlen_forward

        varlen_forward(q, k, v, cu_q, cu_q if cu_k is None else cu_k, longest_q, scale, out, lse)
        return out, lse
    with full_precision(q):
        for i, j in _pairs(q, k, cu_q, cu_k, longest_q, longest_k):
            result, sums = cpu.attention_forward(q[None, i], k[None, j], v[None, j], scale)
            out[i], lse[:, i] = result[0].to(q.dtype), sums[0]
    return out, lse


@_attention_varlen.register_fake
def _(q, k, v, cu_q, cu_k, longest_q, longest_k, scale):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=_lse_dtype(q))


@torch.library.custom_op("fastdeit::attention_varlen_backward", mutates_args=())
def _attention_varlen_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, out: Tensor, lse: Tensor,
    longest_q: int, longest_k: int, scale: float, grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if _runs_kernels(q, k, cu_q):
        from .triton_varlen import varlen_backward

        grads, cu_k = (dq, dk, dv), cu_q if cu_k is None else cu_k
        varlen_backward(grad_out, q, k, v, cu_q, cu_k, out, lse, longest_q, longest_k, scale, grad_lse, grads)
        return grads
    with full_precision(q):
        for i, j in _pairs(q, k, cu_q, cu_k, longest_q, longest_k):
            values = cpu.attention_backward(
                grad_out[None, i], q[None, i], k[None, j], v[None, j], out[None, i], lse[None, :, i],
                scale, None if grad_lse is None else grad_lse[None, :, i],
            )  # fmt: skip
            for grad, value, part in zip((dq, dk, dv), values, (i, j, j)):
                grad[part] = value[0].to(q.dtype)
    return dq, dk, dv


@_attention_varlen_backward.register_fake
def _(grad_out, q, k, v, cu_q, cu_k, out, lse, longest_q, longest_k, scale, grad_lse):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.longest_q, ctx.longest_k, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, grad_lse):
    *inputs, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = _backward_once(grad_out, *inputs, out, lse, ctx.longest_q, ctx.longest_k, ctx.scale, grad_lse)
    return *grads, None, None, None, None, None


_ops = torch.ops.fastdeit
_attend = differentiable("attention_varlen", _ops.attention_varlen.default, _save, _differentiate)
_backward_once = only_once("attention_varlen", _ops.attention_varlen_backward.default)


vmap.in_heads(_attention_varlen, edges=(3, 4))
vmap.in_heads(_attention_varlen_backward, edges=(4, 5))


# FLOP, of the sequences' own lengths, which are read.


def _products(count: int, q: Tensor, cu_q: Tensor, cu_k: Tensor | None) -> int:
    cu_k = cu_q if cu_k is None else cu_k
    return count * 2 * q.shape[1] * q.shape[2] * int((cu_q.long().diff() * cu_k.long().diff()).sum())


@register_flop_formula(_ops.attention_varlen, get_raw=True)
def _(q, k, v, cu_q, cu_k, *_, **__) -> int:
    return _products(2, q, cu_q, cu_k)


@register_flop_formula(_ops.attention_varlen_backward, get_raw=True)
def _(grad_out, q, k, v, cu_q, cu_k, *_, **__) -> int:
    return _products(5, q, cu_q, cu_k)
