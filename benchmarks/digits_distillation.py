"""What each distillation setting brings on the digits: none, soft, hard, hard with attention maps, hard from a cache.

    python -m benchmarks.digits_distillation [--seeds 5] [--folder runs/digits-distillation]

The demo's student (fastdeit/recipes) for each setting and seed; a finished run is not repeated. Two teachers are fitted
once: the demo's CNN, and a plain nano DeiT, since attention maps can be compared with a transformer's only; its hard
labels alone are a row too, so that teacher and attention can be told apart. The logit cache holds 10 epochs, each of
which is used three times in 30. Writes top-1 of each head on the 360 validation images with mean and standard deviation
over the seeds to records/cpu/digits_distillation.csv and .md. One image is 0.28 %.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from fastdeit.cli import FoldedHelp
from fastdeit.models.heads import HEADS

RECORDS = Path(__file__).parent / "records" / "cpu"
VIEWS = 10
PLAIN = "deit_nano_patch4_16"  # the student without a distillation token
CNN, VIT = "runs/cnn", "runs/vit"

# Flags beyond the demo's.
SETTINGS = {
    "none": f"--distillation-type none --model {PLAIN}",
    "soft": f"--distillation-type soft --teacher-path {CNN}",
    "hard": f"--distillation-type hard --teacher-path {CNN}",
    "hard, ViT teacher": f"--distillation-type hard --teacher-path {VIT}",
    "hard + attention, ViT teacher": f"--distillation-type hard --teacher-path {VIT} --attention-distillation-weight 1",
    f"hard, cached logits ({VIEWS} epochs)": "--distillation-type hard --teacher-store {cache}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FoldedHelp)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/digits-distillation"), help="where to run")
    parser.add_argument("--epochs", type=int, help="shorter runs, to try the script; nothing is recorded then")
    arguments = parser.parse_args()
    runs = Runs(arguments.folder.resolve(), arguments.epochs)
    runs.train(CNN, "--recipe teacher_digits")
    runs.train(VIT, f"--model {PLAIN} --distillation-type none")
    results = {
        name: [runs.student(name, flags, seed) for seed in range(arguments.seeds)] for name, flags in SETTINGS.items()
    }
    table = to_table(results)
    print(table)
    if arguments.epochs is None:
        record(results, table)


class Runs:
    def __init__(self, folder: Path, epochs: int | None):
        self.folder, self.epochs = folder, epochs
        folder.mkdir(parents=True, exist_ok=True)

    def student(self, setting: str, flags: str, seed: int) -> dict[str, float]:
        cache = f"caches/seed-{seed}"
        if "{cache}" in flags:
            asked = f"--distillation-type hard --teacher-path {CNN} --seed {seed} --views {VIEWS} --output {cache}"
            self._command("fastdeit.teach store", asked)  # a finished one is left as it is
        name = "".join(letter if letter.isalnum() else "-" for letter in setting)
        return self.train(f"runs/{name}/seed-{seed}", f"{flags.format(cache=cache)} --seed {seed}")

    def train(self, target: str, flags: str) -> dict[str, float]:
        """Top-1 of each head; trained unless there is a finished run in the folder."""
        summary = self.folder / target / "summary.json"
        if not summary.is_file():
            started = time.monotonic()
            epochs = "" if self.epochs is None else f"--epochs {self.epochs} --warmup-epochs 0"
            own = f"--no-compare-undistilled --output-dir {target} --resume auto {epochs}"
            self._command("fastdeit.train", f"{flags} {own}")
            print(f"{target}: {json.loads(summary.read_text())}, {time.monotonic() - started:.0f} s", flush=True)
        return json.loads(summary.read_text())

    def _command(self, module: str, flags: str) -> None:
        command = [sys.executable, "-m", *module.split(), *flags.split()]
        subprocess.run(command, check=True, cwd=self.folder, stdout=subprocess.DEVNULL)


def to_table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: mean and standard deviation over the seeds, per cent."""
    seeds = len(next(iter(results.values())))
    lines = [f"| top-1 %, {seeds} seeds | " + " | ".join(HEADS.values()) + " |", "|---" * (len(HEADS) + 1) + "|"]
    for setting, summaries in results.items():
        cells = [_cell([summary[head] for summary in summaries if head in summary]) for head in HEADS]
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{spread}"


def record(results: dict[str, list[dict[str, float]]], table: str) -> None:
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / "digits_distillation.md").write_text(table)
    with (RECORDS / "digits_distillation.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["setting", "seed", *HEADS])
        for setting, summaries in results.items():
            for seed, summary in enumerate(summaries):
                values = [f"{100 * summary[head]:.2f}" if head in summary else "" for head in HEADS]
                writer.writerow([setting, seed, *values])


if __name__ == "__main__":
    main()
