"""What studies of accuracy share: runs of fastdeit's commands, each a process on one thread, one a core at a time."""

import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .record import surroundings

ROOT = Path(__file__).resolve().parent.parent


def one_a_core(call: Callable, plan: Iterable[Sequence]) -> None:
    """call(*one) for each of the plan, in its order; the first that fails ends them all."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as cores:
        list(cores.map(lambda one: call(*one), plan))


def command(module: str, flags: str, folder: Path) -> None:
    """Run it in `folder`. A run of fastdeit.train that is finished already returns at once."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    words = [sys.executable, "-m", *module.split(), *flags.split()]
    ended = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(words)}\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")


def conditions(study: str) -> dict:
    """What a study's record says of the machine and the versions; each of its runs has one thread."""
    return surroundings("cpu") | {"command": f"python -m benchmarks.{study}", "threads": 1}


def into(target: str) -> str:
    """Flags of a run in that folder, which the same command resumes."""
    return f"--output-dir {target} --resume auto"


def file_name(text: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in text).split())


def seeds_in_words(counts: Iterable[int]) -> str:
    """How many seeds there are of each row: "3 seeds", or "2 to 3 seeds"."""
    least, most = min(counts := set(counts)), max(counts)
    return f"{most} seeds" if least == most else f"{least} to {most} seeds"


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error; None for that of a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.mean(values), error


def gain_in_words(gains: Sequence[float]) -> str:
    """Mean and standard error, such as "+1.3 ± 0.4"; of a single difference the value alone."""
    mean, error = mean_and_error(gains)
    return f"{mean:+.1f}" if error is None else f"{mean:+.1f} ± {error:.1f}"
