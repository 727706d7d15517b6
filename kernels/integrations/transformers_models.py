"""Fused attention for Hugging Face transformers' vision transformers: `attn_implementation="fastdeit"`.

    register_with_transformers()
    model = AutoModelForImageClassification.from_pretrained(
        "facebook/deit-small-patch16-224", attn_implementation="fastdeit"
    )

or, for a model that is there already, `print(apply_to_transformers(model))`.
"""

import inspect
import logging

from torch import Tensor, nn

from fastdeit.kernels.attention.api import attention

from .masks import as_bias, fits
from .report import SwapReport, note_call, why_not_call, why_not_layer, why_not_tensors

logger = logging.getLogger("fastdeit.kernels")

NAME = "fastdeit"
# What other models hand to their attention function and the kernels do not know.
FOREIGN_ARGUMENTS = ("position_bias", "softcap", "cache", "output_attentions")  # SDPA's function warns of the last


def register_with_transformers() -> None:
    """Makes `attn_implementation="fastdeit"` known to transformers, with masks in the form SDPA takes.

    Calls that the kernels cannot serve (dropout in training, causal or grouped heads, an unsupported head_dim)
    go to transformers' SDPA function. Raises ImportError where transformers is not installed or older than 4.56.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            f"apply_to_transformers needs transformers: pip install 'transformers>=4.56' ({error})"
        ) from error

    def fastdeit_attention_forward(
        module: nn.Module,
        query_BHND: Tensor,
        key_BHND: Tensor,
        value_BHND: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        foreign = [name for name in FOREIGN_ARGUMENTS if kwargs.get(name) is not None and kwargs[name] is not False]
        q, k, v = (x.transpose(1, 2) for x in (query_BHND, key_BHND, value_BHND))
        reason = why_not_call(not fits(attention_mask, q, k), dropout, causal) or ", ".join(foreign)
        if not note_call(reason or why_not_tensors(q, k, v)):
            return attention(q, k, v, bias=as_bias(attention_mask, q, k), scale=scaling), None
        return sdpa_attention_forward(
            module,
            query_BHND,
            key_BHND,
            value_BHND,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )

    AttentionInterface.register(NAME, fastdeit_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def apply_to_transformers(model: nn.Module) -> SwapReport:
    """Sets `attn_implementation="fastdeit"` on a transformers model (ViT, DeiT, DINOv2, DINOv3 and their kin).

    In place; the state dict stays as it is. Layers that the kernels cannot serve are named in the report and run
    transformers' SDPA function, as do single calls that ask for causality (a text model's). A layer with
    attention dropout runs the kernels in evaluation and SDPA in training. Models whose attention does not go through
    transformers' attention interface are left alone.

    Returns what was replaced and what was not, and why; logs the same. Raises ImportError as
    `register_with_transformers`, and ValueError for a model that is not transformers'.
    """
    register_with_transformers()
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"apply_to_transformers takes a transformers.PreTrainedModel, not {type(model).__name__}. For a model of "
            "timm's use apply_to_timm."
        )
    layers = {name: layer for name, layer in model.named_modules() if _attends(layer)}
    if any(_uses_interface(layer) for layer in layers.values()):
        model.set_attn_implementation(NAME)
    report = SwapReport()
    for name, layer in layers.items():
        reason = _why_not_layer(layer)
        if reason:
            report.kept[name] = reason
        else:
            report.replaced.append(name)
    logger.log(logging.INFO if report.replaced else logging.WARNING, "%s", report)
    return report


def _uses_interface(layer: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(layer).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _attends(layer: nn.Module) -> bool:
    """The innermost attention modules: what computes with q, k and v, not what holds such a module."""
    if _uses_interface(layer):
        return True
    inner = any("Attention" in type(child).__name__ for child in layer.modules() if child is not layer)
    return type(layer).__name__.endswith("Attention") and not inner


def _why_not_layer(layer: nn.Module) -> str:
    kind = type(layer).__name__
    if not _uses_interface(layer):
        return f"{kind} does not go through transformers' attention interface"
    if getattr(layer.config, "_attn_implementation", None) != NAME:
        return f"{kind} refused the implementation (see transformers' warning)"
    if getattr(layer, "is_causal", True):
        return f"{kind} is causal: SDPA"
    if getattr(layer, "num_key_value_groups", 1) > 1:
        return f"{kind} groups its key and value heads: SDPA"
    head_dim = getattr(layer, "head_dim", getattr(layer, "attention_head_size", None))
    reason = why_not_layer(head_dim)
    if reason:
        return f"{reason}: SDPA"
    if dropout := _dropout(layer):
        return f"{why_not_layer(head_dim, dropout)}: SDPA in training, the kernels in evaluation"
    return ""


def _dropout(layer: nn.Module) -> float:
    """The dropout of the attention maps under the names transformers' vision models give it."""
    names = ("attention_dropout", "dropout_prob", "dropout")
    return next((value for name in names if isinstance(value := getattr(layer, name, None), float)), 0.0)
