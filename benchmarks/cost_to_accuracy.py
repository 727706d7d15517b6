"""What a fixed accuracy costs with each lever, beside the plain recipe: images and CPU-seconds, on Fashion-MNIST.

    python -m benchmarks.cost_to_accuracy [--seeds 3] [--folder runs/cost-to-accuracy] [--fashion-mnist FOLDER]
    python -m benchmarks.cost_to_accuracy --estimate      an estimate for DeiT-S on ImageNet, by arithmetic alone

A nano DeiT learns 18,000 images for EPOCHS epochs, of work for a curriculum; the 2,000 images that are held out by the
seed score the moving average after every epoch (the averaged heads, where there are two). The cost of an accuracy is
where the line through these scores first reaches it. CPU-seconds are the process time of the training epochs, all
threads, decoding and a live teacher included, evaluations and the start not (benchmarks/metered.py). A teacher is a
small CNN that has learnt the same 18,000 images; what it cost itself is not counted. Levers are compared with the plain
recipe seed by seed.

One run a core at a time. What is finished stands in records/cpu/cost_to_accuracy.csv and is not repeated, so that a
stopped study is resumed by the same command; --no-record leaves the committed record alone.

The settings are fixed; no lever was tuned on these images. The plain recipe is that of data_efficiency, and each lever
has what its authors take where that says more. The targets are about what one plain run of seed 100, which is no seed
of the study, had after 3 and 5 of the 6 epochs, 76.7 and 80.4 % (81.1 at the end). Three seeds of all levers take an
hour and forty minutes of two cores.
"""

import argparse
import csv
import json
import math
import statistics
import sys
import threading
from itertools import pairwise
from pathlib import Path

from fastdeit.checkpoint import metrics_log
from fastdeit.cli import FoldedHelp

from . import charts, fashion_mnist, imagenet_cost, metered, studies
from .data_efficiency import PLAIN as WITHOUT_TOKEN
from .data_efficiency import TEACHER
from .record import RECORDS, write_table
from .studies import file_name, into, mean_and_error

EPOCHS, BATCH = 6, 64
TARGETS = (76.5, 80.0)  # per cent
SHARE = 0.1  # held out
DATA = "data/20000/train"
STUDENT = (
    "--recipe demo --no-compare-undistilled --tracker none --input-size 28 --patch-size 7 --hflip 0.5 --scale 0.8 1 "
    f"--lr 1e-3 --model-ema-decay 0.999 --batch-size {BATCH} --val-share {SHARE} --data-path {DATA}"
)
PLAIN = "plain"
LABELS = f"--model {WITHOUT_TOKEN} --distillation-type none"
BY_TEACHER = "--teacher-path {teacher} --distillation-type"
LEVERS = {
    PLAIN: LABELS,
    "muon": f"{LABELS} --opt muon",
    "patch-drop 0.25": f"{LABELS} --patch-drop 0.25",
    "patch-drop 0.5": f"{LABELS} --patch-drop 0.5",
    "curriculum": f"{LABELS} --curriculum 14,21,28",
    "muon, patch-drop 0.25, curriculum": f"{LABELS} --opt muon --patch-drop 0.25 --curriculum 14,21,28",
    "hard": f"{BY_TEACHER} hard",
    "soft": f"{BY_TEACHER} soft --distillation-tau 3",
    "soft, standardised": f"{BY_TEACHER} soft --logit-standardization --distillation-tau 2 --distillation-alpha 0.9",
    "dkd": f"{BY_TEACHER} dkd",
    "nkd": f"{BY_TEACHER} nkd",
    "dist": f"{BY_TEACHER} dist",
    "soft, features": f"{BY_TEACHER} soft --feature-distillation-weight 0.5",
}
COLUMNS = ("lever", "seed", "epoch", "images", "cpu_seconds", "top1")


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.cost_to_accuracy", description=__doc__, formatter_class=FoldedHelp
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/cost-to-accuracy"), help="where data and runs go")
    parser.add_argument("--fashion-mnist", type=Path, metavar="FOLDER", help="with the data's four files")
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS), help="these, and the plain recipe")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="shorter runs, to try the script; never recorded")
    parser.add_argument("--no-record", action="store_true", help="results into --folder only")
    parser.add_argument("--estimate", action="store_true", help="print the estimate for ImageNet, and run nothing")
    arguments = parser.parse_args()
    if arguments.estimate:
        print(imagenet_cost.estimate())
        return 0
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    fashion_mnist.write(folder / "data", arguments.fashion_mnist)
    recorded = not arguments.no_record and arguments.epochs == EPOCHS
    results = Results((RECORDS / "cpu" if recorded else folder) / "cost_to_accuracy.csv")
    study = Study(folder, arguments.epochs, results)
    levers = [lever for lever in LEVERS if lever in (PLAIN, *arguments.levers)]
    # Seeds outermost: a study that is stopped has the same seeds of every lever.
    studies.one_a_core(study.run, [(seed, lever) for seed in range(arguments.seeds) for lever in levers])
    results.summarise()
    print(results.table())
    return 0


class Study:
    """The runs, each a process of its own on one thread."""

    def __init__(self, folder: Path, epochs: int, results: "Results"):
        self.folder, self.epochs, self.results, self.lock = folder, epochs, results, threading.Lock()

    def run(self, seed: int, lever: str) -> None:
        if self.results.has(lever, seed):
            return
        teacher = self.teacher(seed) if "{teacher}" in LEVERS[lever] else ""
        target = f"runs/{file_name(lever)}/seed-{seed}"
        length = f"--epochs {self.epochs} --warmup-epochs {self.epochs / 10} --seed {seed}"
        flags = f"{STUDENT} {length} {LEVERS[lever].format(teacher=teacher)} {into(target)}"
        (self.folder / target).parent.mkdir(parents=True, exist_ok=True)
        studies.command("benchmarks.metered", flags, self.folder)
        self.results.add(lever, seed, curve(self.folder / target))

    def teacher(self, seed: int) -> str:
        """The folder of the teacher of this seed's images, fitted unless it is there."""
        target = f"teachers/seed-{seed}"
        flags = f"{TEACHER} --data-path {DATA} --val-share {SHARE} --seed {seed} --batch-size {BATCH}"
        length = f"--epochs {self.epochs} --warmup-epochs {self.epochs / 10} --eval-every {self.epochs}"
        with self.lock:
            studies.command("fastdeit.train", f"{flags} {length} {into(target)}", self.folder)
        return target


def curve(run: Path) -> list[tuple[int, int, float, float]]:
    """(epoch, images, CPU-seconds, top-1 in per cent) after each epoch of a metered run, counted from 1."""
    _, evaluations = metrics_log.read(run / "metrics.jsonl")
    each, made, seconds, before = metered.costs(run), [], 0.0, 0
    for line in evaluations:
        seconds += each[line["epoch"]] * (line["step"] - before)
        before = line["step"]
        score = line["ema"].get("both", line["ema"]["cls"])
        made.append((line["epoch"] + 1, line["step"] * BATCH, seconds, 100 * score))
    return made


def reached(costs: list[float], scores: list[float], target: float) -> float | None:
    """The cost at which the line through these points first reaches the target; None where it does not."""
    if scores[0] >= target:
        return costs[0]
    for (cost, score), (next_cost, next_score) in pairwise(zip(costs, scores)):
        if next_score >= target:
            return cost + (next_cost - cost) * (target - score) / (next_score - score)
    return None


class Results:
    """The rows of the record, a row an epoch, kept as runs finish."""

    def __init__(self, file: Path):
        self.file, self.lock = file, threading.Lock()
        self.curves: dict[tuple[str, int], list[tuple[int, int, float, float]]] = {}
        if file.is_file():
            with file.open(newline="") as opened:
                for row in csv.DictReader(opened):
                    point = int(row["epoch"]), int(row["images"]), float(row["cpu_seconds"]), float(row["top1"])
                    self.curves.setdefault((row["lever"], int(row["seed"])), []).append(point)

    def has(self, lever: str, seed: int) -> bool:
        return (lever, seed) in self.curves

    def add(self, lever: str, seed: int, points: list[tuple[int, int, float, float]]) -> None:
        with self.lock:
            self.curves[lever, seed] = points
            self.file.parent.mkdir(parents=True, exist_ok=True)
            order = {name: place for place, name in enumerate(LEVERS)}
            rows = [
                (lever, seed, epoch, images, f"{seconds:.1f}", f"{top1:.2f}")
                for lever, seed in sorted(self.curves, key=lambda key: (order[key[0]], key[1]))
                for epoch, images, seconds, top1 in self.curves[lever, seed]
            ]
            write_table(self.file, COLUMNS, rows)
        _, images, seconds, top1 = points[-1]
        print(f"{lever}, seed {seed}: {images:,} images, {seconds:.0f} CPU-seconds, top-1 {top1:.2f} %", flush=True)

    def of(self, lever: str) -> dict[int, list[tuple[int, int, float, float]]]:
        """By seed."""
        return {seed: points for (name, seed), points in self.curves.items() if name == lever}

    def costs(self, lever: str, target: float, column: int) -> dict[int, float | None]:
        """By seed. column: 1 for images, 2 for CPU-seconds."""
        return {
            seed: reached([point[column] for point in points], [point[3] for point in points], target)
            for seed, points in self.of(lever).items()
        }

    def log_ratios(self, lever: str, target: float, column: int) -> list[float]:
        """Logarithms of the lever's costs over the plain recipe's, of the seeds in which both reach the target."""
        own, plain = self.costs(lever, target, column), self.costs(PLAIN, target, column)
        pairs = [(value, plain.get(seed)) for seed, value in own.items()]
        return [math.log(mine / theirs) for mine, theirs in pairs if mine and theirs]

    def in_words(self) -> str:
        """What the table shows."""
        seeds = studies.seeds_in_words(len(self.of(lever)) for lever in filter(self.of, LEVERS))
        return (
            "Training images and CPU-seconds until the moving average has that top-1 on the held-out images, mean over "
            f"{seeds}; in brackets the ratio to the plain recipe, seed by seed, at the end the gain over it, and their "
            "standard errors:"
        )

    def table(self) -> str:
        """Markdown: the mean over the seeds that reached the target, and in brackets how many times the plain recipe's
        cost that is: the geometric mean of the ratios seed by seed, and their standard error."""
        heads = [f"{unit} to {target:g} %" for target in TARGETS for unit in ("images", "CPU-s")]
        heads = ["lever", *heads, "CPU-s in all", "top-1 % at the end"]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for lever in filter(self.of, LEVERS):
            cells = [self._cost(lever, target, column) for target in TARGETS for column in (1, 2)]
            lines.append(f"| {lever} | {' | '.join(cells)} | {self._seconds(lever)} | {self._top1(lever)} |")
        return "\n".join(lines) + "\n"

    def _cost(self, lever: str, target: float, column: int) -> str:
        own = self.costs(lever, target, column)
        values = [value for value in own.values() if value is not None]
        if not values:
            return "not reached"
        few = "" if len(values) == len(own) else f", {len(values)} of {len(own)} seeds"
        logs = self.log_ratios(lever, target, column)
        ratio = "" if lever == PLAIN or not logs else f" ({_ratio(logs)})"
        return f"{statistics.mean(values):,.0f}{ratio}{few}"

    def _seconds(self, lever: str) -> str:
        return f"{statistics.mean(points[-1][2] for points in self.of(lever).values()):,.0f}"

    def _top1(self, lever: str) -> str:
        own, plain = ({seed: points[-1][3] for seed, points in self.of(name).items()} for name in (lever, PLAIN))
        gains = [own[seed] - plain[seed] for seed in own if seed in plain]
        gain = "" if lever == PLAIN or not gains else f" ({studies.gain_in_words(gains)})"
        return f"{statistics.mean(own.values()):.1f}{gain}"

    def summarise(self) -> None:
        """The table, the chart and the conditions beside the record."""
        self.file.with_suffix(".md").write_text(self.table())
        lines = {lever: [[point[1:] for point in points] for points in self.of(lever).values()] for lever in LEVERS}
        charts.accuracy_over_cost(
            {lever: runs for lever, runs in lines.items() if runs}, TARGETS, self.file.with_suffix(".png")
        )
        settings = {"student": STUDENT, "teacher": TEACHER, "levers": LEVERS, "epochs": EPOCHS, "targets": TARGETS}
        self.file.with_suffix(".json").write_text(
            json.dumps(studies.conditions("cost_to_accuracy") | settings, indent=1) + "\n"
        )


def _ratio(logs: list[float]) -> str:
    """x 0.80 ± 0.05; of a single seed the value alone."""
    mean, error = mean_and_error(logs)
    return f"x {math.exp(mean):.2f}" + ("" if error is None else f" ± {math.exp(mean) * error:.2f}")


if __name__ == "__main__":
    sys.exit(main())
