"""One command for a machine with a GPU: are the kernels right there, are they clean, and how fast are they?

    python benchmarks/gpu_checks.py [--minutes 30] [--only program tests]

--only program: python -m fastdeit.doctor, the probe of the decoders, python -m fastdeit.tune, and short runs of the
trainer on the digits: as a user gets it, with the step as one CUDA graph, and with nothing that makes it fast.

--only tests: pytest -m gpu of every file in tests, side by side.

--only sanitizer: compute-sanitizer memcheck and racecheck over one small call of every operation, forward and backward.

--only benchmarks: python -m benchmarks, those of the kernels unless named by --benchmarks, one after another with the
GPU to themselves: they time exactly what a user gets by default.

Every step is a process of its own with its own limit, so that a crash or a hang costs that step only. Output is printed
as it comes, the table last. What does not fit into the minutes is stopped or skipped, and the table says so. Exits with
0 when all that ran has passed.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve()
# Limits in minutes. The first four are the kernels'.
BENCHMARKS = {
    "attention": 4.0, "loss": 2.0, "attention-distillation": 1.0, "norm": 2.0,
    "teacher": 4.0, "train-step": 8.0, "pipeline": 8.0, "epoch": 8.0, "inference": 4.0,
}  # fmt: skip
NEEDS = {  # what a step cannot do without, or all of a folder's tests
    "fastdeit/test_resume": ("tyro", "nvidia.dali"), "fastdeit/test_logit_cache": ("tyro", "nvidia.dali"),
    "tuning": ("tyro",), "run by default": ("tyro", "sklearn", "nvidia.dali"),
    "run as one CUDA graph": ("tyro", "sklearn", "nvidia.dali"), "run as written": ("tyro", "sklearn", "nvidia.dali"),
    "decoder probe": ("nvidia.dali",),
    "pipelines": ("nvidia.dali",), "benchmark pipeline": ("nvidia.dali",), "benchmark epoch": ("nvidia.dali",),
}  # fmt: skip
SANITIZER_TOOLS = ("memcheck", "racecheck")


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    minutes: float
    env: dict[str, str] = field(default_factory=dict)
    refused: str = ""  # what it must not say

    @property
    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        needed = NEEDS.get(self.name) or NEEDS.get(self.name.partition("/")[0], ())
        return [package for package in needed if not _installed(package)]


class Console:
    """Prints to the screen and to the log, one block at a time."""

    def __init__(self, log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.lock = log.open("w"), threading.Lock()

    def print(self, text: str) -> None:
        with self.lock:
            print(text, flush=True)
            self.log.write(text + "\n")
            self.log.flush()


def run(step: Step, deadline: float, console: Console, stream: bool) -> tuple[str, str, float]:
    """(name, what became of it, seconds). With stream, lines are printed as they come, otherwise when it has ended."""
    if step.missing:
        return step.name, f"left out: needs {', '.join(step.missing)}", 0.0
    started = time.monotonic()
    seconds = min(60 * step.minutes, deadline - started)
    if seconds < 5:
        return step.name, "left out: no time", 0.0
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | step.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    stopped = threading.Event()

    def stop():
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)  # its own session, so its children and nothing else

    timer = threading.Timer(seconds, stop)
    timer.start()
    if stream:
        console.print(f"==== {step.name}: {' '.join(step.command)}")
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if stream:
            console.print(lines[-1])
    code = process.wait()
    timer.cancel()
    if not stream:
        console.print("\n".join([f"==== {step.name}: {' '.join(step.command)}", *lines]))
    if stopped.is_set():
        end = f"stopped after {seconds:.0f} s"
    elif any("Device not supported" in line for line in lines):
        end = "left out: not on this machine"  # compute-sanitizer, in some virtual machines
    elif step.refused and any(step.refused in line for line in lines):
        end = f"FAILED ({step.refused})"
    else:
        end = "passed" if code == 0 else f"FAILED (exit {code})"
    return step.name, end, time.monotonic() - started


def program_steps() -> list[Step]:
    """In this order: what is learned of the machine comes first, and the runs share the teacher that the first fits."""
    folder = ROOT / "runs" / f"gpu_checks-{time.strftime('%Y%m%d-%H%M%S')}"

    def run_of(name: str, *flags: str, refused: str = "") -> Step:
        output = folder / name.replace(" ", "-")
        command = [sys.executable, "-m", "fastdeit.train", "--epochs", "5", "--output-dir", str(output), *flags]
        return Step(name, command, 5.0, refused=refused)

    return [
        Step("doctor", [sys.executable, "-m", "fastdeit.doctor", "--slow"], 5.0),
        Step("decoder probe", [sys.executable, "-m", "pytest", "-m", "gpu", "tests/pipelines/test_probe.py"], 3.0),
        Step("tuning", [
            sys.executable, "-m", "fastdeit.tune", "--recipe", "deit_small", "--data-path", "synthetic",
            "--tune", "fresh", "--record", str(folder / "tuning.csv"),
        ], 8.0),
        run_of("run by default"),
        run_of("run as one CUDA graph", "--cuda-graph", "on", refused="cannot be a CUDA graph"),
        run_of("run as written", "--no-compile", "--tune", "off", "--cuda-graph", "off"),
    ]  # fmt: skip


def test_steps() -> list[Step]:
    files = [path for path in sorted((ROOT / "tests").glob("*/test_*.py")) if "mark.gpu" in path.read_text()]
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--tb=short", *workers]
    steps = [Step(f"{path.parent.name}/{path.stem}", [*command, str(path)], 5.0) for path in files]
    # What the emulator of compiled code objects to under Triton 3.6 (LOG.md) comes first, and by name.
    fence = [*command[:5], "tests/kernels/test_attention_triton.py", "-k", "two_key_blocks"]
    return [Step("kernels/fence of two key blocks", fence, 3.0), *steps]


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a package around it
        return False


def sanitizer_steps() -> list[Step]:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return []
    from fastdeit.doctor.checks import OPERATIONS

    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # an allocation each, or reads past one's end land in a neighbour
    flags = ["--error-exitcode", "9"]
    call = [sys.executable, str(HERE), "--exercise"]
    return [
        Step(f"{check} {operation}", [tool, "--tool", check, *flags, *call, operation], 3.0, env)
        for operation in OPERATIONS
        for check in SANITIZER_TOOLS
    ]


def benchmark_steps(names: list[str]) -> list[Step]:
    return [Step(f"benchmark {name}", [sys.executable, "-m", "benchmarks", name], BENCHMARKS[name]) for name in names]


def describe_machine() -> str:
    import torch
    import triton

    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    smi = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True
    )
    return (
        f"{smi.stdout.strip()}; python {sys.version.split()[0]}, torch {torch.__version__}, triton {triton.__version__}"
    )


def check(minutes: float, only: list[str], benchmarks: list[str], log: Path) -> int:
    deadline, console = time.monotonic() + 60 * minutes, Console(log)
    console.print(describe_machine())
    results = []
    if "program" in only:
        results += [run(step, deadline, console, stream=True) for step in program_steps()]
    with ThreadPoolExecutor(max_workers=8) as pool:
        for chosen, steps in (("tests", test_steps), ("sanitizer", sanitizer_steps)):
            if chosen in only:
                planned = steps()
                results += list(pool.map(lambda step: run(step, deadline, console, stream=False), planned))
                if not planned:
                    results.append((chosen, "left out: compute-sanitizer was not found", 0.0))
    if "benchmarks" in only:
        results += [run(step, deadline, console, stream=True) for step in benchmark_steps(benchmarks)]
    console.print("\n".join(["==== summary", *(f"{name:42s} {end:28s} {s:6.0f} s" for name, end, s in results)]))
    return int(any(end.startswith("FAILED") for _, end, _ in results))


def main() -> int:
    from fastdeit.cli import FoldedHelp

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FoldedHelp)
    kinds = ["program", "tests", "sanitizer", "benchmarks"]
    parser.add_argument("--minutes", type=float, default=30.0, help="time for all of it")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, metavar="KIND", help=", ".join(kinds))
    parser.add_argument(
        "--benchmarks", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS)[:4], metavar="NAME"
    )
    parser.add_argument("--log", type=Path, default=ROOT / "runs" / "gpu_checks.log")
    parser.add_argument("--exercise", help="run one operation's small call and nothing else (what the sanitizer runs)")
    arguments = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        print("gpu_checks needs a CUDA device, and PyTorch finds none", file=sys.stderr)
        return 2
    if importlib.util.find_spec("fastdeit") is None or importlib.util.find_spec("fastdeit.kernels") is None:
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]
        subprocess.run(install, check=True)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if arguments.exercise:
        from fastdeit.doctor.operations import Inputs, call

        call(arguments.exercise, Inputs("cuda", torch.bfloat16))
        return 0
    return check(arguments.minutes, arguments.only, arguments.benchmarks, arguments.log)


if __name__ == "__main__":
    sys.exit(main())
