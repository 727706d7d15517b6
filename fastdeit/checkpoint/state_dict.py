"""State dicts from files: .safetensors, its shards by their index, and whatever projects put into torch.save.

Pickles are read by torch.load(weights_only=True), which runs no code from the file.
"""

import argparse
import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Contents:
    """The tensors of a file by name, on the CPU; and what a training checkpoint of timm or facebookresearch/deit says:
    the model's name, pixels on a side."""

    state: StateDict
    notes: tuple[str, ...] = ()
    model: str | None = None
    input_size: int | None = None


def read(path: Path, *, ema: bool = False) -> Contents:
    """ema: the moving average, of a file of torch.save. Raises ValueError for a file that cannot be read."""
    if path.suffix == ".safetensors":
        return Contents(_read_safetensors(path))
    if path.suffix == ".json":
        return Contents(_read_shards(path))
    saved = _read_pickle(path)
    state, notes = _state_dict_in(path, saved, ema)
    arguments = saved.get("args") if isinstance(saved, dict) else None
    name = saved.get("arch") if isinstance(saved, dict) else None
    size = getattr(arguments, "input_size", None)
    return Contents(
        state, notes, model=name if isinstance(name, str) else getattr(arguments, "model", None),
        input_size=size if isinstance(size, int) else None,
    )  # fmt: skip


def read_state_dict(path: str | Path, *, ema: bool = False) -> StateDict:
    """The tensors of a file by name, on the CPU, as they stand there."""
    return read(Path(path), ema=ema).state


def _read_safetensors(path: Path) -> StateDict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); write or download it again") from error


def _read_shards(path: Path) -> StateDict:
    """Weights in several files, with an index of which tensor is where."""
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a readable index of weights ({error}); download it again") from error
    return {key: tensor for name in names for key, tensor in _read_safetensors(path.with_name(name)).items()}


def _read_pickle(path: Path) -> object:
    try:
        # facebookresearch/deit saves its command line, a Namespace, beside the weights: plain attributes, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise anything
        refused = re.search(r"\bGLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is None:
            raise ValueError(f"{path} is not a checkpoint that torch.load can read; download it again") from error
        raise ValueError(
            f"{path} is refused: restoring the {refused[1]} in it would run its code; save the state dict alone, as "
            "safetensors"
        ) from error


# Where projects keep the state dict; the first one found is taken. A teacher is what DINO and its kin publish.
NAMES = (
    "model", "state_dict", "model_state_dict", "model_state", "net", "network", "module", "weights", "params",
    "teacher", "student", "backbone", "encoder",
)  # fmt: skip
EMA_NAMES = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")


def _state_dict_in(path: Path, saved: object, ema: bool) -> tuple[StateDict, tuple[str, ...]]:
    """(the tensors, sentences about where they were)"""
    if isinstance(saved, dict):
        if not ema and _is_state_dict(saved):
            return dict(saved), ()
        held = {name: _within(value) for name, value in saved.items() if isinstance(value, dict)}
        held = {name: state for name, state in held.items() if state is not None}
        for name in EMA_NAMES if ema else NAMES:
            if name in held:
                others = [other for other in held if other != name and other not in EMA_NAMES]
                if name in ("model", "state_dict", *EMA_NAMES) and not others:
                    return held[name], ()
                beside = f", not {' or '.join(map(repr, others))} beside it" if others else ""
                return held[name], (f"the weights are {name!r} of {path}{beside}",)
        found = ", ".join(map(repr, list(saved)[:5])) or "nothing"
    else:
        found = f"a {type(saved).__name__}"
    what, names = ("moving average", EMA_NAMES) if ema else ("state dict", NAMES)
    raise ValueError(f"{path} holds no {what}: expected {' or '.join(map(repr, names[:2]))} in it, found {found}")


def _within(saved: dict) -> StateDict | None:
    """The state dict that `saved` is, or holds under one of NAMES."""
    if _is_state_dict(saved):
        return dict(saved)
    inner = (saved[name] for name in NAMES if isinstance(saved.get(name), dict))
    return next((dict(state) for state in inner if _is_state_dict(state)), None)


def _is_state_dict(saved: dict) -> bool:
    return bool(saved) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in saved.items())
