"""How far seeds differ in the demo, and whether its student gains from its teacher (recorded: no measurable gain).

    python benchmarks/digits_seeds.py [--seeds 5]

Runs `python -m fastdeit.train --seed S` (the demo: one teacher, fitted once) for each seed and writes the top-1 on the
360 validation images, with mean and standard deviation, to records/cpu/digits_seeds.csv. One image is 0.28 %.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COLUMNS = ("teacher", "undistilled", "cls", "dist", "both")
RECORD = Path(__file__).parent / "records" / "cpu" / "digits_seeds.csv"


def run(seed: int, folder: Path) -> dict[str, float]:
    target = folder / f"seed-{seed}"
    command = [sys.executable, "-m", "fastdeit.train", "--seed", str(seed), "--output-dir", str(target)]
    started = time.monotonic()
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    summary = json.loads((target / "summary.json").read_text())
    print(f"seed {seed}: {summary}, {time.monotonic() - started:.0f} s", flush=True)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to run; a temporary folder if not given")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="digits-"))
    folder.mkdir(parents=True, exist_ok=True)
    rows = [run(seed, folder) for seed in range(arguments.seeds)]
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    with RECORD.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["seed", *COLUMNS])
        for seed, row in enumerate(rows):
            table.writerow([seed, *(f"{100 * row[name]:.2f}" for name in COLUMNS)])
        for name, statistic in (("mean", statistics.mean), ("standard deviation", statistics.stdev)):
            table.writerow([name, *(f"{100 * statistic(row[column] for row in rows):.2f}" for column in COLUMNS)])
    print(RECORD.read_text())


if __name__ == "__main__":
    main()
