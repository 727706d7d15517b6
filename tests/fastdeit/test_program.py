"""`fastdeit COMMAND`, which is `python -m fastdeit.COMMAND`."""

import json
import subprocess
import sys

import pytest

from fastdeit import __version__
from fastdeit.__main__ import COMMANDS

from .test_help import COMMANDS as WITH_HELP
from .test_help import HEAVY

TOOK = """
import json, resource, sys
sys.argv = ["fastdeit", *sys.argv[1:]]
from fastdeit.__main__ import script
try:
    script()
except SystemExit as stop:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime
    print(json.dumps({"code": stop.code or 0, "seconds": seconds, "modules": list(sys.modules)}))
"""


def called(*arguments):
    """(stdout, stderr, what it took)"""
    done = subprocess.run([sys.executable, "-c", TOOK, *arguments], capture_output=True, text=True)
    printed, _, took = done.stdout.rstrip().rpartition("\n")
    return printed, done.stderr, json.loads(took)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command_at_once(arguments):
    printed, _, took = called(*arguments)
    assert took["code"] == 0 and took["seconds"] < 0.5  # about 0.03
    assert {*took["modules"]} & {*HEAVY, "numpy", "tyro"} == set()
    assert max(map(len, printed.splitlines())) <= 80
    listed = [line.split()[1] for line in printed.splitlines() if line.startswith("    fastdeit ")]
    assert listed == list(COMMANDS)


def test_every_command_that_has_a_help_is_listed_but_the_one_for_looking_at_views():
    modules = {module for module, _ in COMMANDS.values()}
    assert modules == {f"fastdeit.{name.split()[0]}" for name in WITH_HELP} - {"fastdeit.pipelines.show"}


@pytest.mark.parametrize("command", ["train", "teach store", "evaluate", "doctor"])
def test_a_commands_help_names_it_as_it_was_called(command):
    pytest.importorskip("tyro")
    printed, _, took = called(*command.split(), "--help")
    assert printed.startswith(f"usage: fastdeit {command} ") and took["code"] == 0
    assert {*took["modules"]} & HEAVY == set()


def test_a_command_is_passed_its_arguments_and_its_error_on():
    pytest.importorskip("tyro")
    _, err, took = called("teach", "learn")
    assert (
        took["code"] == 2 and err == "error: teach learn: there is no such command; choose one of fit, store, verify\n"
    )


@pytest.mark.parametrize("name, words", [("trian", "did you mean train?"), ("x", "choose one of train, evaluate")])
def test_an_unknown_command_is_refused_with_the_one_that_is_meant(name, words):
    _, err, took = called(name)
    assert took["code"] == 2 and err.startswith(f"error: fastdeit {name}: ") and words in err


def test_the_version_and_python_m():
    assert called("--version")[0] == f"fastdeit {__version__}"
    done = subprocess.run([sys.executable, "-m", "fastdeit", "--version"], capture_output=True, text=True)
    assert done.stdout == f"fastdeit {__version__}\n"
