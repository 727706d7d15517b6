"""The folder of a run: claimed once, never written over.

settings.json     every setting, as given to the run
metrics.jsonl     one JSON object per line: training figures, and accuracies after each epoch
summary.json      the closing table
curves.png        losses, accuracies, learning rate
first_batch.png   the first augmented batch with its labels
bad_files.txt     images that could not be read, with the cause
checkpoints/      step-N/ for the steps kept; last and best point to two of them
"""

import json
import time
from pathlib import Path

from .command import UserError
from .config import Config


def claim(config: Config) -> Path:
    """The run's folder, made now; refused when something is in it already."""
    folder = config.run.output_dir or _fresh(Path("runs"), f"{config.run.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir {folder}: there is a file of this name; choose another folder")
    if folder.is_dir() and any(folder.iterdir()):
        holder = "another run" if (folder / "settings.json").is_file() else "other files"
        raise UserError(
            f"--output-dir {folder} holds {holder}, which is left untouched: choose another folder, or go on with a run "
            f"by --resume {folder}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", config.to_dict())
    return folder


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _fresh(parent: Path, name: str) -> Path:
    folder, count = parent / name, 1
    while folder.exists():
        count += 1
        folder = parent / f"{name}-{count}"
    return folder
