"""What a run's folder and a checkpoint say in JSON; PyTorch is not needed to read it.

RUN/settings.json          every setting, as the run was started
CHECKPOINT/config.json     what the model is, its classes, the settings, the progress: see files.py
"""

import dataclasses
import json
from pathlib import Path

from fastdeit.config import Config
from fastdeit.errors import UserError


def description(folder: Path) -> dict:
    """What config.json says. Raises UserError if that cannot be read."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {error}") from error


def saved_settings(run: Path) -> Config:
    """The settings a run was started with."""
    try:
        settings = json.loads((run / "settings.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"--resume {run}: there is no run in this folder; give one that holds settings.json") from None
    except ValueError as error:
        raise UserError(f"--resume {run}: its settings.json is damaged ({error})") from error
    return Config.from_dict(settings)


def resumed_settings(resumed: str | None) -> Config | None:
    """What a command line with --resume starts from: the settings of that run, or of a checkpoint (for --eval). None
    where there are none, as in a folder of timm or transformers."""
    if resumed is None:
        return None
    folder = Path(resumed)
    if (folder / "settings.json").is_file():
        return saved_settings(folder)
    if (folder / "config.json").is_file():
        said = description(folder)
        return Config.from_dict(said["settings"]) if isinstance(said, dict) and "settings" in said else None
    return None


def check_unchanged(config: Config, run: Path) -> None:
    """Raises UserError for a changed setting that is not `resumable` (config.setting): it would be another run."""
    saved, wanted = saved_settings(run).to_dict(), config.to_dict()
    for group in dataclasses.fields(Config):
        for field in dataclasses.fields(getattr(config, group.name)):
            value, started_with = wanted[group.name][field.name], saved[group.name][field.name]
            if value != started_with and not field.metadata.get("resumable"):
                raise UserError(
                    f"--{field.name.replace('_', '-')} {value}: the run in {run} was started with {started_with}, and "
                    "a resumed run keeps its settings; omit the flag, or start a new run in another --output-dir"
                )
