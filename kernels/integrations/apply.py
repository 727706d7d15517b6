"""Fused attention for the vision transformers of timm, torchvision, open_clip, Hugging Face transformers, and your own.

model = timm.create_model("deit_small_patch16_224", pretrained=True)
print(apply_to(model))    # fastdeit attention: 12 of 12 attention layers replaced
"""

import logging
import sys

from torch import nn

from .report import SwapReport, why_not_layer
from .sdpa_layers import calls_sdpa, with_fused_sdpa
from .torch_attention import FusedMultiheadAttention

logger = logging.getLogger("fastdeit.kernels")


def apply_to(model: nn.Module) -> SwapReport:
    """Makes, in place, the attention layers of any model run `fastdeit.kernels.attention`.

    timm.layers.Attention and nn.MultiheadAttention (torchvision, open_clip) read q, k and v where the projection left
    them. Any other layer whose forward calls `F.scaled_dot_product_attention` (timm's EvaAttention and AttentionRope
    with their rotary embeddings, attention pooling, your own) has that call served, and computes everything else as
    before; a mask or a bias (relative positions, windows) goes with it, and has its gradient. Models of transformers
    get `attn_implementation="fastdeit"`.

    Parameters, their names and hooks stay as they are. A call the kernels cannot serve (causality, dropout in training,
    grouped heads, a mask of nn.MultiheadAttention) runs as it did before; `attention_calls` counts both kinds. Layers
    that never could be served are left alone and named in the report: attention dropout in timm's, a head_dim that is
    no multiple of 8 from 16 to 128, attention that is not softmax(q kᵀ) v by PyTorch's function.

    Call it before torch.compile and before the model is wrapped for several devices. Returns what was replaced and what
    was left alone, and why; logs the same.
    """
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        from .transformers_models import apply_to_transformers

        return apply_to_transformers(model)
    report = SwapReport()
    for name, layer in model.named_modules():
        if getattr(layer, "runs_fastdeit_attention", False):
            report.replaced.append(name)
            continue
        replacement = _replacement(layer)
        if replacement is None and not _attends(layer):
            continue
        reason = _why_not(layer, replacement)
        if reason:
            report.kept[name] = reason
        else:
            layer.__class__ = replacement
            report.replaced.append(name)
    logger.log(logging.INFO if report.replaced else logging.WARNING, "%s", report)
    return report


def apply_to_timm(model: nn.Module) -> SwapReport:
    """`apply_to` for a model of timm's. Raises ImportError where timm is not installed or older than 1.0.31."""
    try:
        from . import timm_attention  # noqa: F401
    except ImportError as error:
        raise ImportError(f"apply_to_timm needs timm: pip install 'timm>=1.0.31' ({error})") from error
    return apply_to(model)


def _replacement(layer: nn.Module) -> type[nn.Module] | None:
    kind = type(layer)
    if kind is nn.MultiheadAttention:
        return FusedMultiheadAttention
    if f"{kind.__module__}.{kind.__name__}" == "timm.layers.attention.Attention":
        from .timm_attention import FusedAttention

        return FusedAttention
    return with_fused_sdpa(kind) if calls_sdpa(kind) else None  # type: ignore[arg-type]  # mypy: unhashable


def _why_not(layer: nn.Module, replacement: type[nn.Module] | None) -> str:
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if "forward" in vars(layer):
        return "its forward was replaced by somebody else"
    if replacement is None:
        return f"{kind} does not call F.scaled_dot_product_attention"
    if not getattr(layer, "fused_attn", True):
        return f"{kind} has fused_attn turned off (timm.layers.set_fused_attn(experimental=True) before it is made)"
    if kind == "timm.layers.attention.Attention" and not (hasattr(layer, "attn_dim") and hasattr(layer, "gate")):
        return "this version of timm is too old: pip install 'timm>=1.0.31'"
    dropout = getattr(getattr(layer, "attn_drop", None), "p", 0.0)
    head_dim = getattr(layer, "head_dim", None)
    return why_not_layer(16 if head_dim is None else head_dim, dropout)


PROJECTIONS = {"qkv", "q", "k", "qk", "kv", "to_qkv", "to_q", "in_proj", "q_proj"}


def _attends(layer: nn.Module) -> bool:
    """Attention of another kind, by the names people give it and its projections; not the blocks around it."""
    name = type(layer).__name__.lower()
    named = ("attention" in name or "attn" in name) and "block" not in name
    return named or hasattr(layer, "fused_attn") or any(child in PROJECTIONS for child, _ in layer.named_children())
