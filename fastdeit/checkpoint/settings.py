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


def saved_settings(run: Path, flag: str = "--resume") -> Config:
    """The settings a run was started with. flag: that named it."""
    try:
        settings = json.loads((run / "settings.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{flag} {run}: there is no run in this folder; give one that holds settings.json") from None
    except ValueError as error:
        raise UserError(f"{flag} {run}: its settings.json is damaged ({error})") from error
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


def extended_settings(run: str) -> Config:
    """What a command line with --extend starts from: the settings of that run, less what was of it alone."""
    config = saved_settings(Path(run), "--extend")
    own = {"output_dir": None, "resume": None, "eval": False, "dry_run": False, "print_config": False}
    for name, value in own.items():
        setattr(config.run, name, value)
    config.distillation.compare_undistilled = False
    return config


EXTENDED = (  # what the state of a run is made for
    "data.input_size", "data.in_chans", "model.model", "model.patch_size", "model.freeze", "model.attn_only",
    "model.model_ema", "distillation.feature_distillation_weight", "optimization.opt", "optimization.layer_decay",
)  # fmt: skip


def check_extended(config: Config, run: Path) -> None:
    """Raises UserError for a setting that the weights or the optimizer of the extended run are not made for."""
    saved, wanted = saved_settings(run, "--extend").to_dict(), config.to_dict()
    for group, name in (key.split(".") for key in EXTENDED):
        if wanted[group][name] != saved[group][name]:
            flag = f"--{name.replace('_', '-')} {wanted[group][name]}"
            raise UserError(
                f"{flag}: the run in {run} has {saved[group][name]}, and --extend takes over its optimizer as well as "
                f"its weights: omit the flag, or give --finetune {run} in place of --extend for a new optimizer"
            )


def check_unchanged(config: Config, run: Path) -> None:
    """Raises UserError for a changed setting that is not `resumable` (config.setting): it would be another run."""
    saved, wanted = saved_settings(run).to_dict(), config.to_dict()
    for group in dataclasses.fields(Config):
        for field in dataclasses.fields(getattr(config, group.name)):
            value, started_with = wanted[group.name][field.name], saved[group.name][field.name]
            if value != started_with and not field.metadata.get("resumable"):
                more = f", or train on after its end by --extend {run} --epochs N" if field.name == "epochs" else ""
                raise UserError(
                    f"--{field.name.replace('_', '-')} {value}: the run in {run} was started with {started_with}, and "
                    f"a resumed run keeps its settings; omit the flag, or start a new run in another --output-dir{more}"
                )
