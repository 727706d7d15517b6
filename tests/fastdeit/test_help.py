"""--help of every command: within a second, whatever PyTorch and its friends take to import, and as wide as asked."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("tyro")

COMMANDS = [
    "train", "evaluate", "predict", "export", "report", "teach", "teach fit", "teach store", "teach verify",
    "tune", "pipelines.prepare", "pipelines.show", "doctor",
]  # fmt: skip
HEAVY = {"torch", "torchvision", "timm", "transformers", "nvidia", "scipy", "sklearn", "matplotlib", "pyarrow"}

# Runs a module as `python -m` does, then says what that took.
RUN = """
import json, resource, runpy, sys
try:
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
except SystemExit as stop:
    code = stop.code or 0
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"code": code, "seconds": used.ru_utime + used.ru_stime, "modules": list(sys.modules)}))
"""


def help_of(command: str, columns: int = 80) -> tuple[str, dict]:
    """What the command prints, and what that took."""
    module, *rest = command.split()
    line = [sys.executable, "-c", RUN, f"fastdeit.{module}", *rest, "--help"]
    environment = os.environ | {"COLUMNS": str(columns)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    printed, _, took = done.stdout.rstrip().rpartition("\n")
    return printed, json.loads(took)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_fast_and_fits_the_terminal(command, columns):
    printed, took = help_of(command, columns)
    assert took["code"] == 0 and f"python -m fastdeit.{command}" in printed
    assert max(map(len, printed.splitlines()[1:])) <= columns  # the first, the usage, tyro does not fold
    assert HEAVY & {*took["modules"]} == set()
    assert took["seconds"] < 1.5  # about 0.3 on a free core


def test_help_is_grouped_and_states_units_and_defaults():
    printed = help_of("train")[0]
    for text in ("data options", "optimization options", "--distillation-tau", "images in pixels", "(default: 30)"):
        assert text in printed, text


def test_help_of_teach_store_is_its_own():
    printed = help_of("teach store")[0]
    assert printed.count("usage:") == 1 and "handwritten" not in printed
    for words in ("resumes an interrupted cache", "--views", "--top", "--distillation-type"):
        assert words in " ".join(printed.split()), words
