"""Rules for torch.vmap: what is mapped over becomes part of the batch, or of the heads."""

import torch
from torch import Tensor


def in_batch(operator: torch.library.CustomOpDef, bias: int | None = None) -> None:
    """For operators whose tensors have the batch first. bias: the place of an argument of which entry b of the batch
    has bias[b % period]. That holds still where copies of the whole batch, which share a bias, follow one another; and
    where each entry and each bias is followed by its copies. The gradient of a bias needs the latter."""

    def rule(info, in_dims, *arguments):
        size = info.batch_size
        shared = bias is not None and in_dims[bias] is None and arguments[-1] is not True
        place = 0 if bias is None or shared else 1  # of the copies: before the entries, or behind

        def fold(i: int, x):
            if not isinstance(x, Tensor) or (shared and i == bias):
                return x
            return _to(x, in_dims[i], size, place).flatten(0, 1)

        outputs = operator(*(fold(i, x) for i, x in enumerate(arguments)))
        single = isinstance(outputs, Tensor)
        parts = [(size, len(x) // size) for x in ((outputs,) if single else outputs)]
        unfolded = [x.unflatten(0, n[:: 1 - 2 * place]) for x, n in zip((outputs,) if single else outputs, parts)]
        return (unfolded[0], place) if single else (tuple(unfolded), (place,) * len(unfolded))

    operator.register_vmap(rule)


def in_heads(operator: torch.library.CustomOpDef, edges: tuple[int, ...]) -> None:
    """For operators on packed sequences, (tokens, heads, head_dim) or (heads, tokens). edges: the places of the
    arguments that say where these lie. Where those are mapped over themselves, one call follows another."""

    def rule(info, in_dims, *arguments):
        size = info.batch_size
        if any(in_dims[i] is not None for i in edges):
            calls = [
                operator(*(x if dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims)))
                for i in range(size)
            ]
            return tuple(torch.stack(x) for x in zip(*calls)), (0,) * len(calls[0])

        def fold(i: int, x):
            if not isinstance(x, Tensor) or i in edges:
                return x
            heads = x.ndim - (2 if in_dims[i] is None else 3)
            return _to(x, in_dims[i], size, heads).flatten(heads, heads + 1)

        outputs = operator(*(fold(i, x) for i, x in enumerate(arguments)))
        return tuple(x.unflatten(x.ndim - 2, (size, -1)) for x in outputs), tuple(x.ndim - 2 for x in outputs)

    operator.register_vmap(rule)


def _to(x: Tensor, dim: int | None, size: int, place: int) -> Tensor:
    """x with what is mapped over, dimension `dim`, at another place."""
    return x.expand(size, *x.shape).movedim(0, place) if dim is None else x.movedim(dim, place)
