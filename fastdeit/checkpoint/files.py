"""Checkpoints: a folder each, complete or not there at all.

checkpoints/step-00000660/
    config.json           what the model is (enough to rebuild it), its classes, the settings, the progress
    model.safetensors     weights under timm's names; timm and `load_weights` read the file as it is
    ema.safetensors       the moving average's weights, if one is kept
    training.pt           optimizer, gradient scaler: what only the trainer needs; loads with weights_only=True
last -> checkpoints/step-00000660
best -> checkpoints/step-00000528

A checkpoint is written under the name step-N.unfinished, flushed to the disk and renamed; then `last` is moved to it,
then older ones go. So at any instant the links lead to complete checkpoints, and what a kill leaves has that name.
"""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from fastdeit.config import Config
from fastdeit.errors import UserError

from . import atomic
from .settings import description
from .state_dict import read_state_dict


def describe(model, config: Config, classes: tuple[str, ...], mean, std) -> dict:
    """What config.json says of a model: enough to rebuild it and to feed it."""
    patch_size = getattr(getattr(model, "arch", None), "patch_size", config.model.patch_size)
    return {
        "model": config.model.model,
        "num_classes": len(classes),
        "input_size": config.data.input_size,
        "in_chans": config.data.in_chans,
        "patch_size": patch_size,
        "distilled": hasattr(model, "head_dist"),
        "classes": list(classes),
        "mean": list(mean),
        "std": list(std),
        "eval_crop_ratio": config.data.eval_crop_ratio,
        "settings": config.to_dict(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def save(
    run: Path, description: dict, *, step: int, model: dict, ema: dict | None, training: dict, best: bool = False,
    keep: bool = False, keep_count: int | None = None,
) -> Path:  # fmt: skip
    """Write one checkpoint; `last`, and `best` when it is, then point to it. Others that nothing needs are removed.

    `model` and `ema` are state dicts, `training` anything `torch.save` writes without code. keep: keep this one when
    `last` has moved on; keep_count: but only the newest so many of those. Raises OSError (the disk is full); the run
    is then as it was before the call.
    """
    from safetensors.torch import save as to_bytes

    target = folder_of(run, step)
    if not target.is_dir():  # a step that is repeated ends in the same weights
        unfinished = target.with_name(target.name + atomic.UNFINISHED)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            for name, state in (("model", model), ("ema", ema)):
                if state is not None:
                    weights = separate(state)
                    # Not save_file: it leaves the file readable for its owner alone.
                    content = to_bytes(weights, metadata={"format": "pt"})
                    atomic.write(unfinished / f"{name}.safetensors", lambda file, content=content: file.write(content))
            content = io.BytesIO()  # torch.save into a file reports a full disk as another error
            torch.save(training, content)
            atomic.write(unfinished / "training.pt", lambda file: file.write(content.getbuffer()))
            atomic.replace_json(unfinished / "config.json", {**description, "step": step, "keep": keep})
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        unfinished.rename(target)
        atomic.flush_folder(target.parent)
    for link in ("last", "best") if best else ("last",):
        atomic.point(run / link, target)
    remove_unused(run, keep_count)
    return target


def separate(state: dict) -> dict:
    """The tensors on the CPU, each with memory of its own, as safetensors wants them: some of timm's models (CoaT) use
    one parameter under several names."""
    weights, seen = {}, set()
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        weights[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return weights


def note(run: Path, step: int, additions: dict, *, best: bool, keep_count: int | None = None) -> None:
    """Add to the description of a checkpoint what was learnt after it was written: its accuracies."""
    folder = folder_of(run, step)
    if not folder.is_dir():  # it could not be written; that was said
        return
    atomic.replace_json(folder / "config.json", {**description(folder), **additions})
    if best:
        atomic.point(run / "best", folder)
        remove_unused(run, keep_count)


def to_resume(run: Path) -> Path:
    """What --resume takes to resume here: a comparison run, `undistilled`, lies in the folder of its run."""
    return run if (run / "settings.json").exists() else run.parent


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def remove_unused(run: Path, keep_count: int | None = None) -> None:
    """Remove the checkpoints that neither a link nor `keep` holds, and what was left unfinished."""
    linked = {(run / link).resolve() for link in ("last", "best")}
    kept = [folder for folder in _finished(run) if folder not in linked and _is_kept(folder)]
    kept = set(kept if keep_count is None else kept[:keep_count]) | linked
    for folder in _finished(run):
        if folder not in kept:
            # Renamed first, so that a half removed one is never taken for a checkpoint.
            shutil.rmtree(folder.rename(folder.with_name(folder.name + atomic.UNFINISHED)), ignore_errors=True)


def remove_after(run: Path, last: Path) -> None:
    """Remove checkpoints newer than `last`: they cannot be read, or `last` would not have been chosen."""
    for folder in _finished(run):
        if folder > last.resolve():
            shutil.rmtree(folder, ignore_errors=True)


def sweep(run: Path) -> None:
    """Remove what an earlier process was writing, or removing, when it was killed."""
    for leftover in [*run.glob("*" + atomic.UNFINISHED), *(run / "checkpoints").glob("*" + atomic.UNFINISHED)]:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _finished(run: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    folders = (folder.resolve() for folder in (run / "checkpoints").glob("step-*"))
    return sorted((folder for folder in folders if folder.suffix != atomic.UNFINISHED), reverse=True)


def _is_kept(folder: Path) -> bool:
    try:
        return bool(description(folder).get("keep"))
    except UserError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def training_state(folder: Path) -> dict:
    """Optimizer and scaler. Raises UserError for a file that is damaged, or that holds more than data."""
    path = folder / "training.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler stumble anywhere
        raise UserError(
            f"{path} is refused: it is damaged or holds code, which a checkpoint never does ({_first_line(error)})"
        ) from error


def read(folder: Path) -> dict:
    """All of a checkpoint: {"description", "model", "ema" (or None), "training"}. Raises UserError if a part is bad."""
    try:
        return {
            "description": description(folder),
            "model": read_state_dict(folder / "model.safetensors"),
            "ema": read_state_dict(folder / "ema.safetensors") if (folder / "ema.safetensors").exists() else None,
            "training": training_state(folder),
        }
    except (OSError, ValueError) as error:
        raise UserError(f"the checkpoint {folder} cannot be read: {_first_line(error)}") from error


def read_newest(run: Path, say: Callable[[str], None]) -> tuple[Path, dict] | None:
    """(folder, content) of the newest checkpoint that can be read, None where there is none at all.

    One that cannot be read is named; the one before it then takes its place. Raises UserError if none is left.
    """
    failures = []
    for folder in _finished(run):
        try:
            return folder, read(folder)
        except UserError as error:
            failures.append(str(error))
            say(f"{error}; trying the one before")
    if failures:
        raise UserError(f"no checkpoint of {run} can be read: {failures[0]}")
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [error.__class__.__name__])[0]
