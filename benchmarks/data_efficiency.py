"""What distillation is worth on real images: Fashion-MNIST with 1,000, 5,000 and 20,000 training images.

    python -m benchmarks.data_efficiency [--seeds 3] [--folder runs/data-efficiency] [--fashion-mnist FOLDER]

A nano DeiT learns from the labels alone and by each way of distillation, STEPS steps each, whatever the number of
images, and is scored once, at the end, on the 10,000 test images. Every size has teachers of its own, fitted on the
same images: a small CNN, and a plain nano DeiT for the attention maps. Hard distillation with that second teacher alone
is a method too, so that teacher and maps can be told apart.

One run a core at a time. What is finished stands in records/cpu/data_efficiency.csv and is not repeated, so that a
stopped study is resumed by the same command; --no-record leaves the committed record alone.

The record has three seeds; a run takes some six minutes of one core. The settings below were chosen for the student
that learns from labels alone, on images that are in no part of the study (choice-5000) and with seed 100:
benchmarks/LOG.md, 26 November 2026.
"""

import argparse
import csv
import json
import statistics
import sys
import threading
from pathlib import Path

from fastdeit.cli import FoldedHelp

from . import charts, fashion_mnist, studies
from .record import RECORDS, write_table
from .studies import file_name, gain_in_words, into, one_a_core

STEPS, BATCH = 1_872, 64
VIEWS = 10  # epochs in a logit cache
PLAIN = "deit_nano_patch4_16"  # the student without a distillation token
ALONE = "labels alone"
STUDENT = (
    "--recipe demo --no-compare-undistilled --tracker none --input-size 28 --patch-size 7 --hflip 0.5 --scale 0.8 1 "
    "--lr 1e-3 --no-model-ema"
)
METHODS = {
    ALONE: f"--model {PLAIN} --distillation-type none",
    "soft": "--distillation-type soft --distillation-tau 3 --teacher-path {cnn}",
    "hard": "--distillation-type hard --teacher-path {cnn}",
    f"hard, cached logits ({VIEWS} epochs)": "--distillation-type hard --teacher-store {cache}",
    "hard, ViT teacher": "--distillation-type hard --teacher-path {vit}",
    "hard + attention, ViT teacher": "--distillation-type hard --teacher-path {vit} --attention-distillation-weight 1",
    "hard, 20,000 more without labels": "--distillation-type hard --teacher-path {cnn} --unlabelled-path {unlabelled}",
}
TEACHERS = {"the CNN": "hard", "the ViT": "hard, ViT teacher"}  # of which method
TEACHER = "--recipe teacher_digits --tracker none --input-size 28 --hflip 0.5 --scale 0.8 1"
COLUMNS = ("images", "method", "seed", "cls", "dist", "both", "teacher")


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.data_efficiency", description=__doc__, formatter_class=FoldedHelp
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/data-efficiency"), help="where data and runs go")
    parser.add_argument("--fashion-mnist", type=Path, metavar="FOLDER", help="with the data's four files")
    parser.add_argument("--steps", type=int, default=STEPS, help="shorter runs, to try the script; never recorded")
    parser.add_argument("--no-record", action="store_true", help="results into --folder only")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    fashion_mnist.write(folder / "data", arguments.fashion_mnist)
    recorded = not arguments.no_record and arguments.steps == STEPS
    results = Results((RECORDS / "cpu" if recorded else folder) / "data_efficiency.csv")
    study = Study(folder, arguments.steps, results)
    # Seeds outermost: a study that is stopped has the same seeds of every method.
    plan = [
        (seed, size, method) for seed in range(arguments.seeds) for size in fashion_mnist.SIZES for method in METHODS
    ]
    one_a_core(study.student, plan)
    results.summarise()
    print(results.table())
    return 0


class Study:
    """The runs, each a process of its own on one thread."""

    def __init__(self, folder: Path, steps: int, results: "Results"):
        self.folder, self.steps, self.results = folder, steps, results
        self.locks = {name: threading.Lock() for size in fashion_mnist.SIZES for name in (f"cnn-{size}", f"vit-{size}")}

    def student(self, seed: int, size: int, method: str) -> None:
        if self.results.has(size, method, seed):
            return
        flags, teacher = METHODS[method], ""
        values = {"unlabelled": "data/unlabelled"}
        for name in ("cnn", "vit"):
            if f"{{{name}}}" in flags or (name == "cnn" and "{cache}" in flags):
                values[name] = self.teacher(name, size)
                teacher = self.top1(values[name])["cls"]
        target = f"runs/{size}/{file_name(method)}/seed-{seed}"
        images = size + (fashion_mnist.UNLABELLED if "{unlabelled}" in flags else 0)
        common = f"{STUDENT} --data-path data/{size} --seed {seed}"
        if "{cache}" in flags:
            values["cache"] = f"caches/{size}-{seed}"
            asked = (
                f"--distillation-type hard --teacher-path {values['cnn']} --views {VIEWS} --output {values['cache']}"
            )
            self.command("fastdeit.teach store", f"{common} {asked}")
        self.command("fastdeit.train", f"{common} {self.length(images)} {flags.format(**values)} {into(target)}")
        self.results.add(size, method, seed, self.top1(target), teacher)

    def teacher(self, name: str, size: int) -> str:
        """The folder of a teacher for `size` images, fitted unless it is there."""
        target = f"teachers/{name}-{size}"
        with self.locks[f"{name}-{size}"]:
            flags = f"{STUDENT} {METHODS[ALONE]}" if name == "vit" else TEACHER
            self.command("fastdeit.train", f"{flags} --data-path data/{size} {self.length(size)} {into(target)}")
        return target

    def length(self, images: int) -> str:
        """Flags for about `steps` steps, a tenth of them warm-up, with one evaluation at the end."""
        steps_per_epoch = images // BATCH
        epochs = max(1, round(self.steps / steps_per_epoch))
        return f"--epochs {epochs} --warmup-epochs {epochs / 10} --eval-every {epochs} --batch-size {BATCH}"

    def top1(self, target: str) -> dict[str, float]:
        return json.loads((self.folder / target / "summary.json").read_text())

    def command(self, module: str, flags: str) -> None:
        studies.command(module, flags, self.folder)


class Results:
    """The rows of the record, kept as runs finish: top-1 in per cent of each head, and of the run's teacher."""

    def __init__(self, file: Path):
        self.file, self.lock = file, threading.Lock()
        self.rows: dict[tuple[int, str, int], dict[str, str]] = {}
        if file.is_file():
            with file.open(newline="") as opened:
                for row in csv.DictReader(opened):
                    self.rows[int(row["images"]), row["method"], int(row["seed"])] = row

    def has(self, size: int, method: str, seed: int) -> bool:
        return (size, method, seed) in self.rows

    def add(self, size: int, method: str, seed: int, top1: dict[str, float], teacher: float | str) -> None:
        row = {"images": size, "method": method, "seed": seed}
        row |= {head: f"{100 * top1[head]:.2f}" if head in top1 else "" for head in ("cls", "dist", "both")}
        row["teacher"] = f"{100 * teacher:.2f}" if teacher != "" else ""
        with self.lock:
            self.rows[size, method, seed] = row
            self.file.parent.mkdir(parents=True, exist_ok=True)
            order = {method: place for place, method in enumerate(METHODS)}
            keys = sorted(self.rows, key=lambda key: (key[0], order[key[1]], key[2]))
            write_table(self.file, COLUMNS, ([self.rows[key][name] for name in COLUMNS] for key in keys))
        print(", ".join(f"{name} {value}" for name, value in row.items() if value != ""), flush=True)

    def top1(self, size: int, method: str) -> dict[int, float]:
        """By seed, of both heads averaged; a student trained on labels alone has one head."""
        return {
            seed: float(row["both"] or row["cls"])
            for (images, name, seed), row in self.rows.items()
            if (images, name) == (size, method)
        }

    def table(self) -> str:
        """Markdown: mean over the seeds, and in brackets the gain over the labels alone: the mean of the differences
        seed by seed, and its standard error."""
        lines = ["| top-1 % | " + " | ".join(f"{size:,} images" for size in fashion_mnist.SIZES) + " |"]
        lines.append("|---" * (len(fashion_mnist.SIZES) + 1) + "|")
        for method in METHODS:
            cells = [self._cell(size, method) for size in fashion_mnist.SIZES]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        for name, taught in TEACHERS.items():
            cells = [self._teacher(size, taught) for size in fashion_mnist.SIZES]
            lines.append(f"| *{name}* | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def in_words(self) -> str:
        """What the table shows."""
        counts = {len(self.top1(size, method)) for size in fashion_mnist.SIZES for method in METHODS} - {0}
        seeds = studies.seeds_in_words(counts)
        return (
            f"Top-1 % on the 10,000 test images, mean over {seeds}; in brackets the gain over labels alone, seed "
            "by seed, and its standard error; both heads averaged:"
        )

    def _teacher(self, size: int, method: str) -> str:
        found = {row["teacher"] for (images, name, _), row in self.rows.items() if (images, name) == (size, method)}
        return ", ".join(f"{float(teacher):.1f}" for teacher in sorted(found))

    def _cell(self, size: int, method: str) -> str:
        values, alone = self.top1(size, method), self.top1(size, ALONE)
        if not values:
            return ""
        mean = f"{statistics.mean(values.values()):.1f}"
        gains = [values[seed] - alone[seed] for seed in values if seed in alone]
        if method == ALONE or not gains:
            return mean
        return f"{mean} ({gain_in_words(gains)})"

    def summarise(self) -> None:
        """The table, the chart and the conditions beside the record."""
        self.file.with_suffix(".md").write_text(self.table())
        lines = {
            method: {size: list(self.top1(size, method).values()) for size in fashion_mnist.SIZES} for method in METHODS
        }
        charts.accuracy_over_images(lines, self.file.with_suffix(".png"))
        self.file.with_suffix(".json").write_text(
            json.dumps(studies.conditions("data_efficiency") | {"student": STUDENT}, indent=1) + "\n"
        )


if __name__ == "__main__":
    sys.exit(main())
