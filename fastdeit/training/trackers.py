"""Where figures go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio. One at a time, each optional.

    tensorboard   files in RUN/tensorboard; what a run writes when nothing is said, where TensorBoard is installed
    wandb         project fastdeit, or $WANDB_PROJECT; `wandb login` first, or WANDB_MODE=offline
    trackio       project fastdeit, or $TRACKIO_PROJECT; kept on this machine unless $TRACKIO_SPACE_ID says otherwise

A resumed run continues the same record: RUN/tracker_id holds its name there.
"""

import importlib.util
import os
import uuid
from pathlib import Path
from typing import Protocol

from fastdeit.errors import UserError


class Tracker(Protocol):
    def log(self, step: int, figures: dict[str, float]) -> None: ...
    def close(self) -> None: ...


def check(name: str | None) -> None:
    """Refuse a tracker that was asked for and is not installed, before anything is written."""
    if name not in (None, "none") and not _installed(name):
        raise UserError(f"--tracker {name}: {name} is not installed; pip install {name}, or choose --tracker none")


def open_tracker(name: str | None, folder: Path, settings: dict) -> Tracker | None:
    """The tracker of the run in `folder`. `name`: as --tracker takes it; None for TensorBoard where it is installed.

    settings: the run's, as the trackers show them. Raises UserError if the tracker refuses to start.
    """
    check(name)
    if name == "none" or (name is None and not _installed("tensorboard")):
        return None
    opened = {None: TensorBoard, "tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}[name]
    try:
        return opened(folder, settings)
    except Exception as error:  # no account, no network: each library has errors of its own
        raise UserError(f"--tracker {name} does not start ({error}); choose --tracker none to train without") from error


class TensorBoard:
    def __init__(self, folder: Path, settings: dict):
        from torch.utils.tensorboard import SummaryWriter

        self.new_writer = lambda step: SummaryWriter(folder / "tensorboard", purge_step=step)
        self.writer = None

    def log(self, step: int, figures: dict[str, float]) -> None:
        # Opened at the first figure: what an interrupted run has written for later steps is then hidden.
        self.writer = self.writer or self.new_writer(step)
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Wandb:
    def __init__(self, folder: Path, settings: dict):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastdeit"), name=_title(folder), id=_id(folder), resume="allow",
            dir=str(folder), config=settings, reinit="finish_previous",
        )  # fmt: skip
        # wandb drops what is logged for a step before its last one, as a resumed run does; a step of ours it takes.
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.run.log({**figures, "step": step})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    def __init__(self, folder: Path, settings: dict):
        import trackio

        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "fastdeit"), name=f"{_title(folder)}-{_id(folder)}",
            resume="allow", config=settings, embed=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=step)

    def close(self) -> None:
        self.run.finish()


def _installed(package: str) -> bool:
    # A plain folder of that name in the working directory, which wandb likes to leave there, has no origin.
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _title(folder: Path) -> str:
    return "-".join(folder.resolve().parts[-2:])


def _id(folder: Path) -> str:
    file = folder / "tracker_id"
    if not file.is_file():
        file.write_text(uuid.uuid4().hex[:8] + "\n")
    return file.read_text().strip()
