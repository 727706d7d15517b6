"""Measures ours beside its peers, one benchmark after another, each in a process of its own.

    python -m benchmarks attention loss          these two
    python -m benchmarks all                     all of them
    python -m benchmarks all --quick             toy sizes, untimed
    python -m benchmarks attention --heads 6     with a flag of its own
    python -m benchmarks attention --help        lists its flags

Records are written to benchmarks/records/DEVICE; `python -m benchmarks.readme` brings the README up to date with them.
Without a GPU the kernels are not timed (with --quick they run in Triton's interpreter), the rest is. A benchmark
that lacks a package says so and is skipped; `all` succeeds without it.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

KERNELS = ("attention", "loss", "attention-distillation", "norm")
BENCHMARKS = (*KERNELS, "pipeline", "teacher", "train-step", "epoch", "inference")
NOT_RUN = 2  # the exit code of a benchmark that cannot run here, or not with these flags, and has said why
ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    names = [word for word in sys.argv[1:] if not word.startswith("-")]
    if len(names) == 1 and names[0] in BENCHMARKS and {"-h", "--help"} & set(sys.argv):
        return run(names[0], ["--help"], quick=False, device="cpu")
    from fastdeit.cli import FoldedHelp

    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, formatter_class=FoldedHelp)
    parser.add_argument("names", nargs="+", choices=[*BENCHMARKS, "all"], metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="toy sizes, no timing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    arguments, flags = parser.parse_known_args()
    if flags and (len(arguments.names) > 1 or arguments.names == ["all"]):
        parser.error(f"{' '.join(flags)}: flags of one benchmark, so name only that one")
    ends = {}
    for name in BENCHMARKS if "all" in arguments.names else arguments.names:
        print(f"==== {name}", flush=True)
        started = time.monotonic()
        if name in KERNELS and arguments.device == "cpu" and not arguments.quick:
            ends[name] = "needs a CUDA device to be timed; --quick runs it on the CPU without timing"
        elif (code := run(name, flags, quick=arguments.quick, device=arguments.device)) == NOT_RUN:
            ends[name] = "not run: the reason stands above"
        elif code:
            ends[name] = f"FAILED (exit {code})"
        else:
            ends[name] = f"done in {time.monotonic() - started:.0f} s"
    print("\n".join(["====", *(f"{name:24s}{end}" for name, end in ends.items())]))
    if any(end.startswith("FAILED") for end in ends.values()):
        return 1
    asked = "all" not in arguments.names
    return NOT_RUN if asked and any(end.startswith("not run") for end in ends.values()) else 0


def run(name: str, flags: list[str], *, quick: bool, device: str) -> int:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if quick and device == "cpu" and name in KERNELS:
        from fastdeit.kernels.backend import interpreter_lacks

        if (lacking := interpreter_lacks()) is not None:
            print(f"error: {lacking}", file=sys.stderr)
            return NOT_RUN
        environment["TRITON_INTERPRET"] = "1"  # before the first import of Triton, hence out here
    module = f"benchmarks.{name.replace('-', '_')}"
    command = [sys.executable, "-m", module, "--device", device, *(["--quick"] if quick else []), *flags]
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    if importlib.util.find_spec("fastdeit") is None:
        sys.exit("fastdeit is not installed: pip install -e .")
    sys.exit(main())
