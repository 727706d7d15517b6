"""Checkpoints: a folder each, whole or not there at all.

checkpoints/step-00000660/
    config.json           what the model is (enough to build it again), its classes, the settings, the step
    model.safetensors     weights under timm's names; timm and `load_weights` read the file as it is
    ema.safetensors       the moving average's weights, if one is kept
    training.pt           optimizer, gradient scaler: what only the trainer needs; loads with weights_only=True
last -> checkpoints/step-00000660
best -> checkpoints/step-00000528
"""

import json
import os
import shutil
from pathlib import Path

import torch

from .command import UserError
from .config import Config
from .run_directory import write_json


def describe(model, config: Config, classes: tuple[str, ...], mean, std) -> dict:
    """What config.json says of a model: enough to build it again and to feed it."""
    patch_size = getattr(getattr(model, "arch", None), "patch_size", config.model.patch_size)
    return {
        "model": config.model.model,
        "num_classes": len(classes),
        "input_size": config.data.input_size,
        "patch_size": patch_size,
        "distilled": hasattr(model, "head_dist"),
        "classes": list(classes),
        "mean": list(mean),
        "std": list(std),
        "eval_crop_ratio": config.data.eval_crop_ratio,
        "settings": config.to_dict(),
    }


def save(run: Path, description: dict, *, step: int, model: dict, ema: dict | None, training: dict, best: bool) -> Path:
    """Write one checkpoint; `last`, and `best` when it is, then point to it. Older ones nothing points to are removed.

    `model` and `ema` are state dicts, `training` anything `torch.save` writes without code. The folder is written under
    another name and renamed, and the two names are replaced in one move each, so at every moment they lead to a whole
    checkpoint.
    """
    from safetensors.torch import save as to_bytes

    target = run / "checkpoints" / f"step-{step:08d}"
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name, state in (("model", model), ("ema", ema)):
        if state is not None:
            weights = {key: value.detach().cpu().contiguous() for key, value in state.items()}
            # Not save_file: it leaves the file readable for its owner alone.
            (unfinished / f"{name}.safetensors").write_bytes(to_bytes(weights, metadata={"format": "pt"}))
    torch.save(training, unfinished / "training.pt")
    write_json(unfinished / "config.json", {**description, "step": step})
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
    for link in ("last", "best") if best else ("last",):
        _point(run / link, target)
    _remove_unused(run)
    return target


def find(source: str | Path) -> Path:
    """The checkpoint folder `source` means: itself, or the `last` one of a run's folder."""
    source = Path(source)
    for folder in (source, source / "last"):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    raise UserError(f"{source} is no checkpoint: give a run's folder, or last or best in it")


def description(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def training_state(folder: Path) -> dict:
    return torch.load(folder / "training.pt", map_location="cpu", weights_only=True)


def _point(link: Path, target: Path) -> None:
    new = link.with_name(link.name + ".unfinished")
    new.unlink(missing_ok=True)
    new.symlink_to(target.relative_to(link.parent))
    os.replace(new, link)


def _remove_unused(run: Path) -> None:
    kept = {(run / link).resolve() for link in ("last", "best")}
    for folder in (run / "checkpoints").iterdir():
        if folder.resolve() not in kept:
            shutil.rmtree(folder)
