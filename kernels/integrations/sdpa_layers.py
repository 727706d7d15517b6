"""Any layer whose forward calls `F.scaled_dot_product_attention`, or that of `torch.nn.functional` by its full name,
with that call served by the kernels.

A subclass holds the layer's own forward, its code unchanged, in which the name F (or torch) stands for a module with
another scaled_dot_product_attention. So rotary embeddings, norms, gates and pooling are computed by whoever wrote
them, and a new version of the library needs nothing new here.
"""

import sys
import types
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit.kernels.attention.api import attention

from .masks import as_bias, fits
from .report import note_call, why_not_call, why_not_tensors


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's function, by the kernels where they can: (..., heads, tokens, head_dim)."""
    q, k, v = (x.reshape(-1, *x.shape[-3:]).transpose(1, 2) if x.ndim > 2 else x for x in (query, key, value))
    masked = (query.ndim > 4 and attn_mask is not None) or not fits(attn_mask, q, k)
    if note_call(why_not_call(masked, dropout_p, is_causal) or why_not_tensors(q, k, v)):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    out = attention(q, k, v, bias=as_bias(attn_mask, q, k), scale=scale)
    return out.transpose(1, 2).reshape(query.shape)


def _copy(module: types.ModuleType, **changes) -> types.ModuleType:
    copied = types.ModuleType(module.__name__, module.__doc__)
    copied.__dict__.update(vars(module) | changes)
    return copied


functional = _copy(F, scaled_dot_product_attention=scaled_dot_product_attention)
# What a layer's forward calls the function by: the module that stands in for its global, and the names on the way.
STAND_INS = {
    "F": (F, functional, {"F"}),
    "torch": (torch, _copy(torch, nn=_copy(nn, functional=functional)), {"torch", "nn", "functional"}),
}


def _stand_ins(kind: type[nn.Module]) -> dict[str, types.ModuleType]:
    forward = kind.forward
    if not isinstance(forward, types.FunctionType):
        return {}
    names = set(forward.__code__.co_names)
    if "scaled_dot_product_attention" not in names:
        return {}
    return {
        name: stand_in
        for name, (module, stand_in, way) in STAND_INS.items()
        if forward.__globals__.get(name) is module and way <= names
    }


def calls_sdpa(kind: type[nn.Module]) -> bool:
    return bool(_stand_ins(kind))


@cache
def with_fused_sdpa(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `kind`; one for each, whose instances copy, pickle and trace as those of `kind` do."""
    original = kind.forward
    # Without __name__, by which older versions of Dynamo would find the globals of the module instead of these.
    names = {name: value for name, value in original.__globals__.items() if name != "__name__"}
    forward = types.FunctionType(
        original.__code__, names | _stand_ins(kind), original.__name__, original.__defaults__, original.__closure__
    )
    forward.__kwdefaults__ = original.__kwdefaults__
    reduce = lambda layer: (_remake, (kind,), layer.__dict__)  # noqa: E731
    body = {"forward": forward, "__reduce__": reduce, "__module__": kind.__module__, "runs_fastdeit_attention": True}
    fused = type(f"Fused{kind.__name__}", (kind,), body)
    if kind.__module__.startswith("timm.") and "timm.models" in sys.modules:
        from timm.models import register_notrace_module

        register_notrace_module(fused)  # a leaf for timm's feature extraction by torch.fx
    return fused


def _remake(kind: type[nn.Module]) -> nn.Module:
    return (fused := with_fused_sdpa(kind)).__new__(fused)  # type: ignore[arg-type]  # mypy: unhashable
