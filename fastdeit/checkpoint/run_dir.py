"""The folder of a run: claimed once, never written over; opened again by --resume.

settings.json     every setting, as given to the run
tuning.json       what was chosen by measurement when the run was started or resumed last, and the figures
metrics.jsonl     one JSON object per line: training figures, and accuracies after each epoch
summary.json      the closing table
curves.png        losses, accuracies, learning rate, throughput
validation.txt    the images that --val-share holds out
first_batch.png   the first augmented batch with its labels
.lock             held by the process that works on the run
bad_files.txt     images that could not be read, with the cause
nonfinite.jsonl   steps whose loss or gradient was not finite, with their files
checkpoints/      step-N/ for the steps kept; last and best point to two of them
"""

import fcntl
import json
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch

from fastdeit.config import Config
from fastdeit.curriculum import Curriculum
from fastdeit.distributed.world import World
from fastdeit.errors import UserError

from . import atomic
from .settings import check_unchanged, description


def open_folder(config: Config, world: World) -> Path:
    """The run's folder, locked until this process leaves: the one --resume means, else a new one, which is given up if
    the run is refused before it has begun."""
    folder = to_resume(config)
    if folder is None:
        folder, made = claim(config)
        world.at_end.push(lambda _, error, __: _give_up(folder, made, error))
    world.at_end.enter_context(_lock(folder))
    return folder


def to_resume(config: Config) -> Path | None:
    """The folder of a started run that --resume means, its settings compared with these; None for a run that begins."""
    if config.run.resume is None:
        return None
    if config.run.resume == "auto" and config.run.output_dir is None:
        raise UserError("--resume auto looks for the run in --output-dir: give one, the same each time")
    folder = config.run.output_dir if config.run.resume == "auto" else Path(config.run.resume)
    if config.run.resume == "auto" and not (folder / "settings.json").exists():
        return None
    check_unchanged(config, folder)
    return folder


def summary_of_finished(config: Config) -> dict | None:
    """The closing table of the run that --resume means, if it has come to its end."""
    folder = to_resume(config)
    if folder is None or not (folder / "summary.json").is_file() or _goes_on(config, folder):
        return None
    return json.loads((folder / "summary.json").read_text())


def _goes_on(config: Config, folder: Path) -> bool:
    """Whether the run in this folder, which is finished, had lost patience, and has more of it now."""
    if not (folder / "last").exists():
        return False
    progress = description(folder / "last")["progress"]
    patience, stale = config.run.patience, progress.get("stale", 0)
    return progress["epochs_evaluated"] < Curriculum.of(config).epochs and (patience is None or stale < patience)


def folder_of(config: Config) -> Path:
    """The folder that these settings mean: of the run to resume, the one given, or a new one's."""
    name = f"{config.run.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    return to_resume(config) or config.run.output_dir or _fresh(Path("runs"), name)


def claim(config: Config) -> tuple[Path, bool]:
    """(the run's folder, whether it was made now: an empty one may be there); refused when something is in it."""
    folder = folder_of(config)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir {folder}: there is a file of this name; choose another folder")
    if folder.is_dir() and any(folder.iterdir()):
        holder = "another run" if (folder / "settings.json").is_file() else "other files"
        raise UserError(
            f"--output-dir {folder} holds {holder}, which is left untouched: choose another folder, or resume the "
            f"run by --resume {folder}"
        )
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    atomic.replace_json(folder / "settings.json", config.to_dict())
    return folder, made


def _give_up(folder: Path, made: bool, error: BaseException | None) -> None:
    """Remove what was made for nothing: it would stand in the way of the same command with its mistake put right. A
    folder that was there before is emptied again."""
    begun, refusals = ("checkpoints", "nonfinite.jsonl"), (UserError, ValueError, torch.OutOfMemoryError)
    if not isinstance(error, refusals) or any((folder / name).exists() for name in begun):
        return
    with suppress(OSError):  # what the user is to read is why the run was refused
        for path in [folder] if made else list(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _lock(folder: Path) -> IO:
    """Keep a second process from writing into the same run: a job that was queued again while the first still lives.
    The lock lasts until the file is closed, which the end of the process does, however it ends."""
    file = (folder / ".lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process is at work on the run in {folder}; wait for it, or end it") from None
    except OSError:
        pass  # a file system without locks
    return file


def _fresh(parent: Path, name: str) -> Path:
    folder, count = parent / name, 1
    while folder.exists():
        count += 1
        folder = parent / f"{name}-{count}"
    return folder
