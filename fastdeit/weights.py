"""Weights from files into models: our checkpoint folders, timm's files and facebookresearch/deit's.

`load_weights` either loads every parameter or changes nothing and says why. Two things may differ between file and
model: the grid of patches (the position embedding is interpolated) and, with `new_head`, the classes.
Pickles are read by torch.load(weights_only=True), which runs no code from the file.
"""

import argparse
import math
import pickle
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

StateDict = dict[str, Tensor]


def load_weights(
    model: nn.Module,
    source: str | Path,
    *,
    new_head: bool = False,
    ema: bool = False,
    old_grid: tuple[int, int] | None = None,
) -> list[str]:
    """Fill `model` (ours or timm's) from `source`; returns sentences about what was not simply copied.

    source: a folder with model.safetensors (a run's folder means its last/), a .safetensors file, or a
    file of torch.save: a state dict, alone or under 'model' or 'state_dict' as facebookresearch/deit and timm have it.
    new_head: where the number of classes differs, keep the model's fresh head instead of refusing.
    ema: take the exponential moving average: 'model_ema' or 'state_dict_ema' of a pickle, ema.safetensors of a folder.
    old_grid: (rows, columns) of patches behind the file's position embedding; a square unless said.

    Raises ValueError when the file cannot be read, or does not fit; the model is then as it was.
    """
    path = checkpoint_file(source, ema=ema)
    state = _timm_names(read_state_dict(path, ema=ema))
    fresh, notes = model.state_dict(), []
    heads = head_names(model)
    _check_kind(path, state, fresh)
    _fit_heads(path, state, fresh, heads, new_head, notes)
    _fit_position_embedding(path, model, state, old_grid, notes)
    _check_keys(path, state, fresh)
    model.load_state_dict(state, strict=True)
    return notes


def checkpoint_file(source: str | Path, *, ema: bool = False) -> Path:
    """The file of weights that `source`, a file or a folder, means. Raises ValueError if there is none."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(
            f"no checkpoint at {path}: give a folder with model.safetensors, or a .safetensors or .pth file"
        )
    name = "ema.safetensors" if ema else "model.safetensors"
    for candidate in (path / name, path / "last" / name):
        if candidate.is_file():
            return candidate
    raise ValueError(f"the folder {path} holds no checkpoint: there is no {name} in it or in last/")


def read_state_dict(path: str | Path, *, ema: bool = False) -> StateDict:
    """The tensors of a file by name, on the CPU, without the wrappers' prefixes (DDP's, torch.compile's)."""
    path = Path(path)
    if path.suffix == ".safetensors":
        state = _read_safetensors(path)
    else:
        state = _unwrap(path, _read_pickle(path), ema)
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in state.items()}


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
    """The modules that answer with one number per class, as the model's (timm's) configuration names them."""
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


# Reading


def _read_safetensors(path: Path) -> StateDict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); write or download it again") from error


def _read_pickle(path: Path) -> object:
    try:
        # facebookresearch/deit saves its command line, a Namespace, beside the weights: plain attributes, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler stumble anywhere
        refused = re.search(r"\bGLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is None:
            raise ValueError(f"{path} is not a checkpoint that torch.load can read; download it again") from error
        raise ValueError(
            f"{path} is refused: restoring the {refused[1]} in it would run its code; save the state dict alone, as "
            "safetensors"
        ) from error


def _unwrap(path: Path, saved: object, ema: bool) -> StateDict:
    names = ("model_ema", "state_dict_ema") if ema else ("model", "state_dict")
    if isinstance(saved, dict):
        for name in names:
            if isinstance(saved.get(name), dict):
                return saved[name]
        if not ema and saved and all(isinstance(value, Tensor) for value in saved.values()):
            return dict(saved)
        found = ", ".join(map(repr, list(saved)[:5])) or "nothing"
    else:
        found = f"a {type(saved).__name__}"
    what = "moving average" if ema else "state dict"
    raise ValueError(f"{path} holds no {what}: expected {' or '.join(map(repr, names))} in it, found {found}")


def _timm_names(state: StateDict) -> StateDict:
    """facebookresearch/deit's LayerScale (models_v2.py: gamma_1) under timm's name (ls1.gamma)."""
    return {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name): tensor for name, tensor in state.items()}


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
    theirs, ours = (tensors["patch_embed.proj.weight"].shape[-1] for tensors in (state, fresh))
    if theirs != ours:
        raise ValueError(f"{path} has patches of {theirs} pixels, the model of {ours}: make the model with {theirs}")


def _fit_heads(path: Path, state: StateDict, fresh: StateDict, heads, new_head: bool, notes: list[str]) -> None:
    for head in heads:
        weight, bias = f"{head}.weight", f"{head}.bias"
        if weight not in fresh or (weight not in state and not new_head):
            continue  # a model without heads, or a file without: reported with all other keys
        theirs, ours = len(state.get(weight, ())), len(fresh[weight])
        if theirs == ours:
            continue
        if not new_head:
            raise ValueError(
                f"{path} answers for {theirs} classes, the model for {ours}: make the model with {theirs} classes, or "
                "fine-tune it with a new head (--finetune, or new_head=True)"
            )
        notes.append(
            f"{head} starts fresh for {ours} classes: {path} " + (f"has {theirs}" if theirs else "has no head")
        )
        for name in (weight, bias):
            state.pop(name, None)
            if name in fresh:
                state[name] = fresh[name]


def _fit_position_embedding(path: Path, model: nn.Module, state: StateDict, old_grid, notes: list[str]) -> None:
    ours, theirs = getattr(model, "pos_embed", None), state.get("pos_embed")
    grid = getattr(model, "grid_size", None) or getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if ours is None or theirs is None or grid is None or (ours.shape == theirs.shape and old_grid in (None, grid)):
        return
    prefix_tokens = ours.shape[1] - grid[0] * grid[1]
    try:
        resized = interpolate_position_embedding(theirs, grid, prefix_tokens=prefix_tokens, old_grid=old_grid)
    except ValueError as error:
        raise ValueError(f"the position embedding of {path} does not fit: {error}") from error
    state["pos_embed"] = resized
    patches = theirs.shape[1] - prefix_tokens
    notes.append(f"position embedding interpolated from {patches} patches to {grid[0]} x {grid[1]} (bicubic)")


def _check_keys(path: Path, state: StateDict, fresh: StateDict) -> None:
    complaints = []
    if missing := [name for name in fresh if name not in state]:
        complaints.append(f"it lacks {_few(missing)}")
    if unexpected := [name for name in state if name not in fresh]:
        complaints.append(f"it has {_few(unexpected)}, which the model has not")
    for name in fresh.keys() & state.keys():
        if state[name].shape != fresh[name].shape:
            complaints.append(f"{name} is {_shape(state[name])} in the file, {_shape(fresh[name])} in the model")
            break
    if complaints:
        raise ValueError(f"{path} is of another model: {'; '.join(complaints)}; make the model that the file is of")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"
