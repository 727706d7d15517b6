"""Fused attention for timm's vision transformers.

model = timm.create_model("deit_small_patch16_224", pretrained=True)
print(apply_to_timm(model))    # fastdeit attention: 12 of 12 attention layers replaced
"""

import logging

from torch import nn

from .report import SwapReport, why_not

logger = logging.getLogger(__name__)


def apply_to_timm(model: nn.Module) -> SwapReport:
    """Replaces, in place, the attention of a timm VisionTransformer, DeiT or DeiT III by `attention_qkvpacked`.

    Every timm.layers.Attention in the model is replaced, with its query and key norms, output norm and gate where it
    has them. Parameters, their names and hooks stay as they are. Left alone and named in the report: layers with
    attention dropout or a head_dim the kernels do not support, and attention of other classes (relative positions,
    rotary embeddings, windows, pooling). A mask given to forward runs timm's code for that call.

    Call it before torch.compile and before the model is wrapped for several devices. Returns what was replaced and what
    was left alone, and why; logs the same. Raises ImportError where timm is not installed or older than 1.0.31.
    """
    try:
        from timm.layers import Attention

        from .timm_attention import FusedAttention
    except ImportError as error:
        raise ImportError(f"apply_to_timm needs timm: pip install 'timm>=1.0.31' ({error})") from error

    report = SwapReport()
    for name, layer in model.named_modules():
        if type(layer) is Attention:
            reason = _why_not_attention(layer)
            if reason:
                report.kept[name] = reason
            else:
                layer.__class__ = FusedAttention
                report.replaced.append(name)
        elif type(layer) is FusedAttention:
            report.replaced.append(name)
        elif _attends(layer):
            report.kept[name] = _why_not_other(layer)
    logger.log(logging.INFO if report.replaced else logging.WARNING, "%s", report)
    return report


def _why_not_attention(layer: nn.Module) -> str:
    if "forward" in vars(layer):
        return "its forward was replaced by somebody else"
    if not hasattr(layer, "attn_dim") or not hasattr(layer, "gate"):
        return "this version of timm is too old: pip install 'timm>=1.0.31'"
    return why_not(layer.head_dim, layer.attn_drop.p)


def _attends(layer: nn.Module) -> bool:
    """Attention of another kind, by timm's conventions; not the blocks around it."""
    name = type(layer).__name__.lower()
    named = ("attention" in name or "attn" in name) and "block" not in name
    return named or hasattr(layer, "fused_attn")


def _why_not_other(layer: nn.Module) -> str:
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    parts = [
        name for kinds in (layer.named_parameters, layer.named_buffers, layer.named_children) for name, _ in kinds()
    ]
    if any("rel_pos" in name or "relative" in name for name in parts):
        return f"{kind} adds a relative position bias to the logits"
    return f"{kind} is not timm.layers.Attention"
