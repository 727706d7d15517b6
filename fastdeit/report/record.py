"""What the folder of a run tells, read without changing it; the files are those of run_dir.py."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from fastdeit.checkpoint import metrics_log
from fastdeit.curriculum import Curriculum
from fastdeit.errors import UserError

STANDSTILL = 60  # seconds between two lines of the log beyond the time measured in them: the run was not at work

NOT_LEARNED = ("__metadata__", "running_mean", "running_var", "num_batches_tracked")  # in a file of weights


@dataclass(frozen=True)
class Record:
    """settings, summary and description (last/config.json) are {} where there is no such file.

    training, evaluations: the lines of metrics.jsonl by their kind
    undistilled: the evaluations of the comparison run
    tuning: what was chosen by measurement, as tuning.Choice.to_dict has it
    bad_files: (name, cause) of images that could not be read
    nonfinite: what nonfinite.py wrote about steps that were not finite
    """

    folder: Path
    settings: dict
    summary: dict
    description: dict
    training: list[dict]
    evaluations: list[dict]
    undistilled: list[dict]
    tuning: list[dict]
    bad_files: list[tuple[str, str]]
    nonfinite: list[dict]

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Raises UserError for a folder that is no run, or whose settings cannot be read."""
        if not (folder / "settings.json").is_file():
            holder = "the comparison run of another one" if (folder.parent / "settings.json").is_file() else "no run"
            raise UserError(
                f"{folder} is {holder}: give the folder that holds settings.json and metrics.jsonl, such as runs/RUN"
            )
        try:
            settings = json.loads((folder / "settings.json").read_text())
        except ValueError as error:
            raise UserError(
                f"{folder / 'settings.json'} is damaged ({error}): last/config.json holds the settings too"
            ) from error
        training, evaluations = metrics_log.read(folder / "metrics.jsonl")
        return cls(
            folder=folder,
            settings=settings,
            summary=_json(folder / "summary.json"),
            description=_json(folder / "last" / "config.json"),
            training=training,
            evaluations=evaluations,
            undistilled=metrics_log.read(folder / "undistilled" / "metrics.jsonl")[1],
            tuning=_list(folder / "tuning.json"),
            bad_files=_bad_files(folder / "bad_files.txt"),
            nonfinite=metrics_log.json_lines(folder / "nonfinite.jsonl"),
        )

    # -----------------------------------------------------------------------------------------------------------------
    # How far it is

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @cached_property
    def lines(self) -> list[dict]:
        """All lines of the log, in the order they were written."""
        return sorted(self.training + self.evaluations, key=lambda line: (line["step"], line["kind"] == "eval"))

    @property
    def step(self) -> int:
        steps = [line["step"] for line in self.lines]
        return max([*steps, self.description.get("step", 0)])

    @cached_property
    def steps_per_epoch(self) -> int | None:
        """None before the first epoch has ended."""
        if not self.evaluations:
            return None
        return self.evaluations[0]["step"] // (self.evaluations[0]["epoch"] + 1)

    @property
    def total_steps(self) -> int | None:
        return self.steps_per_epoch and self.steps_per_epoch * self.curriculum.epochs

    @property
    def curriculum(self) -> Curriculum:
        size = self.setting("input_size")
        full = tuple(size) if isinstance(size, list) else size
        return Curriculum.read(self.setting("curriculum") or "none", self.setting("epochs"), full)

    def setting(self, name: str):
        """None for one that the run's version did not have."""
        return next((values[name] for values in self.settings.values() if name in values), None)

    @property
    def attention(self) -> str | None:
        """How it was computed, as far as that is known."""
        asked = self.setting("attention")
        found = [choice["chosen"] for choice in self.tuning if choice["question"] == "attention"]
        return asked if asked != "auto" else (found or ["sdpa"])[0]

    @property
    def parameters(self) -> int | None:
        """Counted in the header of the last checkpoint's weights, which is JSON behind its length."""
        try:
            with (self.folder / "last" / "model.safetensors").open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        except (OSError, ValueError):
            return None
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if not name.endswith(NOT_LEARNED))

    @property
    def processes(self) -> int | None:
        """How many worked on it; None before the first checkpoint."""
        own = self.setting("batch_size") * (self.setting("accumulate") or 1)
        return self.images_per_step and self.images_per_step // own

    @property
    def images_per_step(self) -> int | None:
        return self.description.get("progress", {}).get("global_batch")

    # -----------------------------------------------------------------------------------------------------------------
    # Accuracy

    @property
    def is_detailed(self) -> bool:
        """Whether the last checkpoint is of the last evaluation: then it knows more of it than the log."""
        known = {
            source: {head: value["top1"] for head, value in heads.items()}
            for source, heads in self.description.get("accuracy", {}).items()
        }
        return bool(known and self.evaluations) and known.items() <= self.evaluations[-1].items()

    @property
    def accuracies(self) -> dict[str, dict]:
        """Of the last evaluation: {"model" or "ema": {head: {"top1"}}}, with "top5", "loss", "ece" if `is_detailed`."""
        if self.is_detailed:
            return self.description["accuracy"]
        heads = {source: self.evaluations[-1].get(source, {}) for source in ("model", "ema") if self.evaluations}
        return {source: {head: {"top1": top1} for head, top1 in heads[source].items()} for source in heads}

    def best(self, source: str, head: str) -> tuple[float, int]:
        """(top-1, epoch counted from 1) of the best evaluation, the first of equals."""
        best = max((line for line in self.evaluations if head in line.get(source, {})), key=lambda l: l[source][head])
        return best[source][head], best["epoch"] + 1

    # -----------------------------------------------------------------------------------------------------------------
    # Time

    @cached_property
    def began(self) -> float | None:
        """Seconds since 1970; None for logs without times."""
        first = self.lines[0] if self.lines else {}
        return first["time"] - _measured(first) if "time" in first else None

    @property
    def ended(self) -> float | None:
        return self.lines[-1].get("time") if self.lines else None

    @property
    def working(self) -> float | None:
        """Seconds from the beginning to the last line of the log, without those of `standstill`."""
        return None if self.began is None else self.ended - self.began - self.standstill

    @cached_property
    def standstill(self) -> float:
        """Seconds between two lines of the log in which the run was not at work: it was stopped, and then resumed."""
        times = [(line["time"], _measured(line)) for line in self.lines if "time" in line]
        gaps = [after - before - measured for (before, _), (after, measured) in pairwise(times)]
        return sum(gap for gap in gaps if gap > STANDSTILL)

    @cached_property
    def phases(self) -> dict[str, float]:
        """Seconds by phase, as metrics.jsonl names them, in the order of a step; "rest" is what no phase covers. They
        add up to the time the run was at work."""
        phases: dict[str, float] = {}
        for line in self.lines:
            for phase, value in line.get("seconds", {}).items():
                phases[phase] = phases.get(phase, 0.0) + value
        if "evaluation" in phases:  # after what belongs to the steps, whichever line came first
            phases["evaluation"] = phases.pop("evaluation")
        if phases and self.began is not None:
            phases["rest"] = max(0.0, self.working - sum(phases.values()))
        return phases

    @property
    def timed_steps(self) -> int:
        return max((line["step"] for line in self.training if "seconds" in line), default=0)


def _measured(line: dict) -> float:
    return sum(line.get("seconds", {}).values())


def _json(path: Path) -> dict:
    """{} for a file that is not there, or is just being replaced."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _list(path: Path) -> list[dict]:
    found = _json(path)
    return found if isinstance(found, list) else []


def _bad_files(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
    return [(name, cause) for name, _, cause in (line.partition("\t") for line in lines)]
