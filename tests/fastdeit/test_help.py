"""--help of every command: within a second, whatever PyTorch and its friends take to import, and as wide as asked."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("tyro")

COMMANDS = [
    "train", "evaluate", "predict", "export", "report", "pipelines.prepare",
    "pipelines.show",
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


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_there_before_pytorch_would_be(command):
    printed, took = help_of(command)
    assert took["code"] == 0 and f"python -m fastdeit.{command}" in printed
    assert HEAVY & {*took["modules"]} == set()
    assert took["seconds"] < 1.5  # about 0.3 on a free core
