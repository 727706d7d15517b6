"""Measure in advance what a training run would choose on this machine, with the flags of the run.

    python -m fastdeit.tune --recipe deit_small_distilled \\
        --data-path DIR --teacher-path TEACHER
    torchrun --nproc-per-node 8 -m fastdeit.tune ...

The answers are remembered (~/.cache/fastdeit/tuning.json), so that runs of these shapes start at once, as jobs of a
queue should. What is already remembered is shown and not measured again, unless --tune fresh is given. --data-path
synthetic does where the images are elsewhere, and the teacher has 1,000 classes.
"""

import csv
import json
import os
import platform
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from fastdeit.cli import parse_config
from fastdeit.config import Config
from fastdeit.errors import UserError, run


@dataclass(kw_only=True)
class RecordOptions:
    """Where the figures go beside the terminal."""

    record: Path | None = None
    """CSV file for the table, a row for each candidate; a JSON file beside it has the machine, versions and command."""


@dataclass(kw_only=True)
class _CommandLine(Config):
    """The settings of the run to come, and the record."""

    figures: RecordOptions = field(default_factory=RecordOptions)


def main() -> None:
    given = parse_config(prog="python -m fastdeit.tune", kind=_CommandLine, description=__doc__)
    config = Config(**{group.name: getattr(given, group.name) for group in fields(Config)})
    if config.speed.tune == "off":
        raise UserError("--tune off leaves nothing to measure: omit it, or give --tune fresh to measure again")
    if given.figures.record is not None and given.figures.record.suffix != ".csv":
        raise UserError(f"--record {given.figures.record}: give a name that ends in .csv")
    if config.run.resume is not None:
        raise UserError("--resume: a resumed run keeps what was chosen for it; give the flags of a run to come")
    from fastdeit.demo import with_digits
    from fastdeit.distributed.world import join
    from fastdeit.training import run as training

    with join(config.run.device) as world:
        training.set_up(config, world)
        choices = training.tune(with_digits(config, world), world)
        if world.is_main and given.figures.record is not None:
            write(given.figures.record, choices)
            print(f"written to {given.figures.record}")


COLUMNS = ("question", "on", "candidate", "ms", "ratio_to_default", "difference", "remark")


def write(file: Path, choices: list[dict]) -> None:
    """The table as CSV, and what a reader needs to trust or repeat it as JSON beside it."""
    import torch

    from fastdeit.tuning import table

    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(COLUMNS)
        for choice in choices:
            writer.writerows([choice["question"], table.about(choice), *row] for row in table.rows_of(choice))
    described = {
        "command": shlex.join(["python", "-m", "fastdeit.tune", *sys.argv[1:]]),
        "python": platform.python_version(), **(choices[0]["here"] if choices else {}),
        "threads": torch.get_num_threads(), "load average at the end": [round(value, 1) for value in os.getloadavg()],
        "questions": [{**choice, "rows": len(choice["rows"])} for choice in choices],
    }  # fmt: skip
    file.with_suffix(".json").write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
