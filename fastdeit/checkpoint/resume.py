"""Resuming a run from its newest readable checkpoint, as if it had never stopped. Its settings: see settings.py."""

import json
from pathlib import Path

from fastdeit.config import Config
from fastdeit.distributed.world import World
from fastdeit.errors import UserError

from . import atomic, files, metrics_log
from .settings import check_extended


def checkpoint_to_come(config: Config) -> dict | None:
    """What config.json says of the checkpoint that is going to fill the model, the run's own or the one it extends;
    None for a run that begins."""
    for run in (_resumed(config), config.run.extend):
        if run is not None and (Path(run) / "last").exists():
            return files.description(Path(run) / "last")
    return None


def _resumed(config: Config) -> Path | str | None:
    return config.run.output_dir if config.run.resume == "auto" else config.run.resume


def extended_run(config: Config) -> Path | None:
    """The finished run whose end is this one's beginning (--extend). None where there is none, and where this run has
    a checkpoint of its own already. Raises UserError if it cannot be extended so."""
    resumed = _resumed(config)
    if config.run.extend is None or (resumed is not None and (Path(resumed) / "last").exists()):
        return None
    run = Path(config.run.extend)
    check_extended(config, run)
    if not (run / "summary.json").is_file() or not (run / "last").exists():
        raise UserError(f"--extend {run}: this run is not finished: resume it by --resume {run}, then extend it")
    done = files.description(run / "last")["progress"]["epochs_evaluated"]
    if config.optimization.epochs <= done:
        raise UserError(
            f"--extend {run}: it has {done} epochs already: give the number of them all, --epochs {2 * done}"
        )
    return run


def without_start(config: Config) -> Config:
    """The settings to build the model with. Where a checkpoint is going to fill it, the weights that a run began with
    are not read again, and may be gone."""
    if checkpoint_to_come(config) is None:
        return config
    config = Config.from_dict(config.to_dict())
    config.model.finetune, config.model.pretrained = None, False
    return config


def check_same(progress: dict, trainer, index) -> None:
    """Refuse another data set, another teacher, and a number of processes that makes another batch."""
    if index.fingerprint != progress["data"]:
        more = trainer.config.distillation.unlabelled_path
        where, flags = (f" and {more}", "--data-path and --unlabelled-path") if more else ("", "--data-path")
        raise UserError(
            f"the training images in {trainer.config.data.data_path}{where} are not those the run was started with: "
            f"names, sizes or classes differ; give the same data by {flags}, or start a new run"
        )
    if trainer.teacher is not None and trainer.teacher.fingerprint != progress["teacher"]:
        raise UserError(
            f"the teacher {trainer.teacher.name} is not the one the run was started with: weights or classes differ, "
            "or one is live and the other cached; give the same by --teacher-path or --teacher-store, or start a new "
            "run"
        )
    batch, processes = trainer.global_batch, trainer.world.world_size
    if batch != progress["global_batch"]:
        raise UserError(
            f"a step of this run sees {progress['global_batch']} images, but {processes} processes x --batch-size "
            f"{trainer.config.data.batch_size} x --accumulate {trainer.config.optimization.accumulate} = {batch}: "
            "choose values with the same product"
        )


def start(run: Path, world: World) -> dict | None:
    """Clear up what an earlier process left in `run`, and read where it stands: see checkpoint.read, None at the
    very beginning. Every process gets it, so all must see the folder. metrics.jsonl is cut back to that step."""
    found = _start(run) if world.is_main else None
    folder = world.broadcast(found and found[0])
    if folder is None or world.is_main:
        return found and found[1]
    return files.read(folder)


def _start(run: Path) -> tuple[Path, dict] | None:
    files.sweep(run)
    found = files.read_newest(run, print)
    if found is None:
        cut_metrics(run / "metrics.jsonl", step=0, epochs_evaluated=0)
        return None
    folder, saved = found
    atomic.point(run / "last", folder)
    files.remove_after(run, folder)
    cut_metrics(
        run / "metrics.jsonl", step=saved["description"]["step"],
        epochs_evaluated=saved["description"]["progress"]["epochs_evaluated"],
    )  # fmt: skip
    return found


def cut_metrics(path: Path, *, step: int, epochs_evaluated: int) -> None:
    """Remove the lines of what is going to be done again."""
    if path.exists():
        kept = [
            json.dumps(line) + "\n" for line in metrics_log.json_lines(path)
            if line["step"] <= step and (line["kind"] != "eval" or line["epoch"] < epochs_evaluated)
        ]  # fmt: skip
        atomic.replace(path, "".join(kept).encode())
