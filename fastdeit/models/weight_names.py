"""The same parameter under the names of other projects, brought under the model's own.

A name is changed only where the model does not have the old one, and has the new one; weights that fit as they are,
such as those of our own checkpoints, are never touched.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fastdeit.checkpoint.state_dict import StateDict


def match(path: Path, state: StateDict, fresh: StateDict, heads: Sequence[str], notes: list[str]) -> StateDict:
    """`state`, as far as may be, under the names of the model's own `fresh` weights. heads: the model's, which may be
    missing or differ. notes: is told what was done. Raises ValueError where two readings fit equally well."""
    state = dict(state)
    if _fits(state, fresh, heads):
        return state
    state = _without_prefix(path, state, fresh, heads, notes)
    state = _layer_scale(state, fresh)
    return _from_transformers(state, fresh)


def _fits(state: StateDict, fresh: StateDict, heads: Sequence[str]) -> bool:
    return all(name in state for name in fresh if not _is_of(name, heads))


def _is_of(name: str, heads: Sequence[str]) -> bool:
    return any(name.startswith(f"{head}.") for head in heads)


# ---------------------------------------------------------------------------------------------------------------------
# Wrappers: DDP's module., torch.compile's _orig_mod., Lightning's model., ...

WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+$")  # they say nothing about what is inside


def _without_prefix(path: Path, state: StateDict, fresh: StateDict, heads: Sequence[str], notes: list) -> StateDict:
    """Without the one prefix under which `state` has the model's names. Those of a wrapper around everything are
    nothing to tell."""
    body = [name for name in fresh if not _is_of(name, heads)]
    anchors = {*body, *_transformers_anchors()}
    prefixes = {}
    for name in state:
        for dot in (match.end() for match in re.finditer(r"\.", name)):
            if name[dot:] in anchors and name not in anchors:
                prefixes[name[:dot]] = prefixes.get(name[:dot], 0) + 1
    if not prefixes:
        return state
    most = max(prefixes.values())
    chosen = [prefix for prefix, count in prefixes.items() if count == most]
    # Shorter names (norm.weight) are found below inner modules as well; the right prefix is found far more often.
    rivals = [prefix for prefix, count in prefixes.items() if count > most / 2 and prefix not in chosen]
    if len(chosen) + len(rivals) > 1:
        both = ", ".join(sorted([*chosen, *rivals]))
        raise ValueError(f"{path} has these weights more than once ({both}): save the state dict of one of them alone")
    (prefix,) = chosen
    if not most > len(body) / 2 and not all(name.startswith(prefix) for name in state):
        return state
    kept = {name: tensor for name, tensor in state.items() if name in fresh}  # a head beside a wrapped backbone
    others = [name for name in state if not name.startswith(prefix) and name not in kept]
    if not WRAPPERS.match(prefix) or others:
        left = f"; {len(others)} others are left out, such as {others[0]}" if others else ""
        notes.append(f"the names in {path} are read without their prefix {prefix}{left}")
    inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return kept | inner


# ---------------------------------------------------------------------------------------------------------------------
# facebookresearch/deit's LayerScale (models_v2.py: gamma_1) is timm's ls1.gamma


def _layer_scale(state: StateDict, fresh: StateDict) -> StateDict:
    renamed = {}
    for name, tensor in state.items():
        new = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
        renamed[new if name not in fresh and new in fresh else name] = tensor
    return renamed


# ---------------------------------------------------------------------------------------------------------------------
# transformers' ViT and DeiT, as published (encoder.layer) and as their code names them since version 5 (layers)

FROM_TRANSFORMERS = (
    (r"^(?:vit|deit)\.embeddings\.cls_token$", "cls_token"),
    (r"^(?:vit|deit)\.embeddings\.distillation_token$", "dist_token"),
    (r"^(?:vit|deit)\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^(?:vit|deit)\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:vit|deit)\.layernorm\.", "norm."),
    (r"^(?:vit|deit)\.(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"^(?:cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
    (r"(?<=\d\.)attention\.(?:attention\.)?q(?:uery|_proj)\.", "attn.q."),
    (r"(?<=\d\.)attention\.(?:attention\.)?k(?:ey|_proj)\.", "attn.k."),
    (r"(?<=\d\.)attention\.(?:attention\.)?v(?:alue|_proj)\.", "attn.v."),
    (r"(?<=\d\.)attention\.(?:output\.dense|o_proj)\.", "attn.proj."),
    (r"(?<=\d\.)(?:intermediate\.dense|mlp\.fc1)\.", "mlp.fc1."),
    (r"(?<=\d\.)(?:output\.dense|mlp\.fc2)\.", "mlp.fc2."),
    (r"(?<=\d\.)layernorm_before\.", "norm1."),
    (r"(?<=\d\.)layernorm_after\.", "norm2."),
)


def _transformers_anchors() -> tuple[str, ...]:
    names = ("cls_token", "position_embeddings")
    return tuple(f"{base}.embeddings.{name}" for base in ("vit", "deit") for name in names)


def _from_transformers(state: StateDict, fresh: StateDict) -> StateDict:
    if not any(name in state for name in _transformers_anchors()) or "blocks.0.attn.qkv.weight" not in fresh:
        return state
    renamed = {}
    for name, tensor in state.items():
        for pattern, new in FROM_TRANSFORMERS:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    for name in [name for name in renamed if ".attn.q." in name]:  # three projections are one here
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in renamed for part in parts):
            renamed[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


# ---------------------------------------------------------------------------------------------------------------------


def by_timm(model: nn.Module, state: StateDict) -> StateDict | None:
    """As timm converts what others published for this model, which resizes tables of relative positions too; None where
    it has no conversion, or that does not take this."""
    module = sys.modules.get(type(model).__module__)
    convert = getattr(module, "checkpoint_filter_fn", None) if module.__name__.startswith("timm.") else None
    if convert is None:
        return None
    try:
        return convert(dict(state), model)
    except Exception:  # it was written for certain files, and raises anything for others
        return None
