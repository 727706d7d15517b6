"""The record of a measurement: records/DEVICE/NAME.csv, NAME.json with the conditions, and the charts.

A record's JSON holds its headlines, the lines that `python -m benchmarks.readme` puts into the README.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastdeit.cli import FoldedHelp

RECORDS = Path(__file__).parent / "records"
PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "timm",
    "xformers",
    "transformers",
    "liger-kernel",
    "nvidia-dali-cuda130",
    "pillow",
    "onnxruntime",
)
NO_TIMING = "quick run: every path at toy size, no timing"


@dataclass(frozen=True)
class Headline:
    """One line of the README's table: what was done, how fast ours and the fastest peer were, by which factor ours was
    faster (below 1: slower), and which share of the physical floor ours reached, where there is one."""

    what: str
    ours: str
    peer: str
    theirs: str
    ratio: float
    floor_share: float | None = None


def parser(doc: str) -> argparse.ArgumentParser:
    """The flags every benchmark has."""
    made = argparse.ArgumentParser(
        f"python -m benchmarks {Path(sys.argv[0]).stem.replace('_', '-')}",
        description=doc,
        formatter_class=FoldedHelp,
    )
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    made.add_argument("--quick", action="store_true", help="toy sizes, no timing, no record")
    made.add_argument("--no-record", action="store_true", help="print only")
    return made


class Record:
    """Rows under columns, headlines and conditions, written in full by each call of `write`."""

    def __init__(self, name: str, arguments: argparse.Namespace, columns: Sequence[str]):
        self.name, self.device, self.quick, self.columns = name, arguments.device, arguments.quick, columns
        self.rows: list[Sequence] = []
        self.headlines: list[Headline] = []
        self.conditions: dict = {}
        self.folder = RECORDS / device_name(self.device)
        if self.quick:  # written all the same, and thrown away: a quick run takes every path
            self._temporary = tempfile.TemporaryDirectory()
            self.folder = Path(self._temporary.name)
            print(NO_TIMING)
        elif arguments.no_record:
            self.folder = None

    def path(self, name: str) -> Path | None:
        """Where a chart or a further table of this record goes; None when nothing is to be written."""
        if self.folder is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def write(self) -> None:
        table = self.path(f"{self.name}.csv")
        if table is None:
            return
        write_table(table, self.columns, self.rows)
        described = surroundings(self.device) | self.conditions
        if self.quick:
            described["timing"] = NO_TIMING
        described["headlines"] = [asdict(headline) for headline in self.headlines]
        table.with_suffix(".json").write_text(json.dumps(described, indent=1) + "\n")


def write_table(path: Path, columns: Iterable[str], rows: Iterable[Sequence]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def device_name(device: str) -> str:
    """The folder of a device's records: "cpu", "nvidia-h200"."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device).replace(" ", "-").lower()


def surroundings(device: str) -> dict:
    """Versions, device, clocks and the command: what a reader needs to trust or repeat a record."""
    name = Path(sys.argv[0]).stem.replace("_", "-")
    flags = [flag for flag in sys.argv[1:] if flag not in ("--device", device)]
    described = {"command": " ".join(["python -m benchmarks", name, *flags]), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            continue
    described["threads"] = torch.get_num_threads()
    if device == "cpu":
        described["cores"] = len(os.sched_getaffinity(0))
        described["load average at the end"] = [round(value, 1) for value in os.getloadavg()]
    else:
        query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
        smi = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        described[query] = subprocess.run(smi, capture_output=True, text=True).stdout.strip()
    return described
