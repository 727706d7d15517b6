"""Weights from files into models: our folders, timm's and transformers', and files of many projects.

`load_weights` either loads every parameter or changes nothing and says why. Three things may differ between file and
model: the names of parameters (weight_names.py), the grid of patches (the position embedding is interpolated) and, with
`new_head`, the classes. Each is reported.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit.checkpoint.state_dict import StateDict, read
from fastdeit.data import order_of_numbers

from . import sources, weight_names
from .sources import Source


def load_weights(
    model: nn.Module,
    source: str | Path | Source,
    *,
    new_head: bool = False,
    classes: Sequence[str] | None = None,
    ema: bool = False,
    old_grid: tuple[int, int] | None = None,
) -> list[str]:
    """Fill `model` (ours or timm's) from `source`; returns sentences about what was not simply copied.

    source: what sources.find takes: a folder of ours, timm or transformers, a .safetensors file, or a file of
        torch.save: a state dict, alone or under a name such as 'model' or 'state_dict'
    new_head: where the classes differ, keep the model's fresh head instead of refusing
    classes: names of the model's outputs. With new_head a head is kept only if the source's classes, where they are
        known, are the same; in another order its rows are put into this one
    ema: take the exponential moving average: 'model_ema' or 'state_dict_ema' of a pickle, ema.safetensors of a folder
    old_grid: (rows, columns) of patches behind the source's position embedding, where the source does not say; a square
        unless given

    Raises ValueError when the source cannot be read, or does not fit; the model is then as it was.
    """
    if not isinstance(source, Source):
        source = sources.find(source, weights="ema" if ema else "model")
    contents = read(source.weights, ema=ema)
    state, notes = fit(
        model, contents.state, source, new_head=new_head, classes=classes,
        old_grid=old_grid or grid_of(source, contents.state),
    )  # fmt: skip
    model.load_state_dict(state, strict=True)
    return [*contents.notes, *notes]


def fit(
    model: nn.Module,
    state: StateDict,
    source: Source,
    *,
    new_head: bool = False,
    classes: Sequence[str] | None = None,
    old_grid: tuple[int, int] | None = None,
) -> tuple[StateDict, list[str]]:
    """(`state` under the model's names and in its shapes, sentences about what was done). Raises ValueError."""
    fresh, notes = model.state_dict(), []
    state = weight_names.match(source.path, state, fresh, head_names(model), notes)
    _check_kind(source.path, state, fresh)
    _fit_channels(model, state, fresh, notes)
    _fit_heads(source, state, fresh, head_names(model), classes if new_head else None, new_head, notes)
    _fit_position_embedding(source.path, model, state, old_grid, notes)
    if complaints := _complaints(state, fresh):
        converted = weight_names.by_timm(model, state)
        if converted is None or _complaints(converted, fresh):
            size = "" if state.keys() ^ fresh.keys() else ", at the size of images it was trained for"
            raise ValueError(
                f"{source.path} is of another model: {'; '.join(complaints)}; make the model that the file is of{size}"
            )
        state = converted
        notes.append("names and shapes converted as timm does for this model")
    return state, notes


def grid_of(source: Source, state: StateDict) -> tuple[int, int] | None:
    """(rows, columns) of patches behind the position embedding, as far as `source` says; None where it does not."""
    kernel = state.get("patch_embed.proj.weight")
    patch = source.patch_size or (kernel.shape[-1] if kernel is not None and kernel.ndim == 4 else None)
    if source.input_size is None or not patch:
        return None
    return source.input_size[0] // patch, source.input_size[1] // patch


def interpolate_position_embedding(
    pos_embed: Tensor, new_grid: tuple[int, int], *, prefix_tokens: int, old_grid: tuple[int, int] | None = None
) -> Tensor:
    """(1, prefix + old patches, D) -> (1, prefix + new patches, D): patches resized bicubically, prefix copied.

    The formula is that of facebookresearch/deit main.py, whose published 384-pixel models began so: align_corners off,
    no antialiasing. timm's resample_abs_pos_embed antialiases, which also means another cubic in PyTorch (a = -0.5
    instead of -0.75), so its values differ a little even where the grid grows. Computed in float32.
    Raises ValueError where the old grid cannot be known.
    """
    prefix, patches = pos_embed[:, :prefix_tokens], pos_embed[:, prefix_tokens:]
    if old_grid is None:
        side = math.isqrt(patches.shape[1])
        old_grid = (side, side)
    if old_grid[0] * old_grid[1] != patches.shape[1]:
        raise ValueError(
            f"{patches.shape[1]} positions of patches do not form a grid of {old_grid[0]} x {old_grid[1]}; give the "
            "rows and columns of the grid as old_grid"
        )
    if old_grid == tuple(new_grid):
        return pos_embed
    image_1DHW = patches.float().unflatten(1, old_grid).permute(0, 3, 1, 2)
    image_1DHW = F.interpolate(image_1DHW, size=tuple(new_grid), mode="bicubic", align_corners=False)
    return torch.cat([prefix, image_1DHW.flatten(2).transpose(1, 2).to(prefix.dtype)], dim=1)


def head_names(model: nn.Module) -> tuple[str, ...]:
    """The modules whose outputs are the class logits, as the model's (timm's) configuration names them."""
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def first_convolution(model: nn.Module) -> nn.Module | None:
    """The layer that reads the images, as the model's (timm's) configuration names it."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    name = names[0] if isinstance(names, (tuple, list)) and names else names
    modules = dict(model.named_modules()) if name else {}
    layer = modules.get(name)
    return layer if hasattr(layer, "weight") else None


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """(out, in, rows, columns) -> (out, channels, rows, columns), for images of another number of channels: to one
    their sum, to more repeated in turn and scaled such that grey images give what they gave (timm's
    adapt_input_conv)."""
    own, exact = weight.shape[1], weight.float()
    if channels == 1:
        return exact.sum(1, keepdim=True).to(weight.dtype)
    repeated = exact.repeat(1, -(-channels // own), 1, 1)[:, :channels]
    return (repeated * (own / channels)).to(weight.dtype)


# Fitting: each step either makes `state` agree with the model or raises


def _check_kind(path: Path, state: StateDict, fresh: StateDict) -> None:
    if "cls_token" not in state or "cls_token" not in fresh:
        return
    if "dist_token" in state and "dist_token" not in fresh:
        raise ValueError(f"{path} has a distillation token, the model has none: choose the model's distilled variant")
    if "dist_token" in fresh and "dist_token" not in state:
        raise ValueError(f"{path} has no distillation token, the model has one: choose the model's plain variant")
    theirs, ours = state["cls_token"].shape[-1], fresh["cls_token"].shape[-1]
    if theirs != ours:
        raise ValueError(f"{path} is of a model {theirs} channels wide, this one has {ours}: choose the model it is of")
    kernels = [tensors.get("patch_embed.proj.weight") for tensors in (state, fresh)]
    if any(kernel is None or kernel.ndim != 4 for kernel in kernels):
        return
    theirs, ours = (kernel.shape[-1] for kernel in kernels)
    if theirs != ours:
        raise ValueError(f"{path} has patches of {theirs} pixels, the model of {ours}: make the model with {theirs}")


def _fit_channels(model: nn.Module, state: StateDict, fresh: StateDict, notes: list[str]) -> None:
    layer = first_convolution(model)
    for name in (name for name, module in model.named_modules() if module is layer is not None):
        weight = state.get(f"{name}.weight")
        if weight is None or weight.ndim != 4 or weight.shape[1] == layer.weight.shape[1]:
            continue
        state[f"{name}.weight"] = adapt_channels(weight, layer.weight.shape[1])
        notes.append(f"{name} adapted from {weight.shape[1]} to {layer.weight.shape[1]} channels of the images")


def _fit_heads(source: Source, state: StateDict, fresh: StateDict, heads, classes, new_head: bool, notes) -> None:
    nameless = False
    for head in heads:
        weight, bias = f"{head}.weight", f"{head}.bias"
        if weight not in fresh or (weight not in state and not new_head):
            continue  # a model without heads, or a file without: reported with all other keys
        theirs, ours = len(state.get(weight, ())), len(fresh[weight])
        cause = None
        if theirs != ours:
            if not new_head:
                raise ValueError(
                    f"{source.path} has {theirs} classes, the model {ours}: make the model with {theirs} "
                    "classes, or fine-tune it with a new head (--finetune, or new_head=True)"
                )
            cause = f"has {theirs}" if theirs else "has no head"
        elif classes is not None and source.classes is None:
            nameless = True
        elif classes is not None and set(source.classes) != set(classes):
            cause = f"has the classes {_few(source.classes)}, not {_few(classes)}"
        elif classes is not None and tuple(source.classes) != tuple(classes):
            order = torch.tensor([source.classes.index(name) for name in classes])
            state |= {name: state[name][order] for name in (weight, bias) if name in state}
            notes.append(f"the rows of {head} are put into the order of the data's classes")
        if cause is not None:
            notes.append(f"{head} starts fresh for {ours} classes: {source.path} {cause}")
            for name in (weight, bias):
                state.pop(name, None)
                if name in fresh:
                    state[name] = fresh[name]
    if nameless:
        notes.append(
            f"{source.path} does not name its {len(classes)} classes: they are taken for the data's, {_few(classes)}, "
            "in this order"
        )
        if (order := order_of_numbers(classes)) is not None:
            notes.append(order)


def _fit_position_embedding(path: Path, model: nn.Module, state: StateDict, old_grid, notes: list[str]) -> None:
    ours, theirs = getattr(model, "pos_embed", None), state.get("pos_embed")
    grid = getattr(model, "grid_size", None) or getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or not all(isinstance(tensor, Tensor) and tensor.ndim == 3 for tensor in (ours, theirs)):
        return
    prefix_tokens = ours.shape[1] - grid[0] * grid[1]
    patches = theirs.shape[1] - prefix_tokens
    if prefix_tokens < 0 or patches < 1:
        return  # another meaning of the name; reported with all other shapes
    if old_grid is not None and old_grid[0] * old_grid[1] != patches and ours.shape == theirs.shape:
        old_grid = None  # what was said is of something else: patches that overlap, say
    side = math.isqrt(patches)
    if old_grid is None and ours.shape == theirs.shape and grid[0] != grid[1] and side * side == patches:
        raise ValueError(
            f"the {patches} positions of {path} may be a grid of {side} x {side} or the model's {grid[0]} x {grid[1]}: "
            "say which as old_grid"
        )
    if ours.shape == theirs.shape and old_grid in (None, tuple(grid)):
        return
    try:
        resized = interpolate_position_embedding(theirs, grid, prefix_tokens=prefix_tokens, old_grid=old_grid)
    except ValueError as error:
        raise ValueError(f"the position embedding of {path} does not fit: {error}") from error
    state["pos_embed"] = resized
    notes.append(f"position embedding interpolated from {patches} patches to {grid[0]} x {grid[1]} (bicubic)")


def _complaints(state: StateDict, fresh: StateDict) -> list[str]:
    complaints = []
    if missing := [name for name in fresh if name not in state]:
        complaints.append(f"it lacks {_few(missing)}")
    if unexpected := [name for name in state if name not in fresh]:
        complaints.append(f"it has {_few(unexpected)}, which the model has not")
    for name in fresh.keys() & state.keys():
        if state[name].shape != fresh[name].shape:
            complaints.append(f"{name} is {_shape(state[name])} in the file, {_shape(fresh[name])} in the model")
            break
    return complaints


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"
