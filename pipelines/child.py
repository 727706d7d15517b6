"""Calls in a Python process of their own, each with a time limit.

What a library may do to its process (end it by a signal, wait forever) costs that call and nothing else: the calls
after it are made in a new process.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

POLL = 0.02  # seconds


class Call(NamedTuple):
    function: str  # "package.module:name"; it returns what JSON can hold
    arguments: tuple[Any, ...] = ()  # what JSON can hold


class Outcome(NamedTuple):
    value: Any = None  # what the function returned
    failure: str | None = None  # what became of it otherwise: a signal's name, an exception, the time limit
    ended: bool = False  # whether its process ended with it, or was stopped


def outcomes(calls: Sequence[Call], *, seconds: float, environment: Mapping[str, str] | None = None) -> list[Outcome]:
    """What became of each call. They share a process as long as it lives; an exception does not end it.

    seconds: limit of each call; the first one of a process has its start and the imports to bear
    environment: added to this process's
    """
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="fastdeit-") as folder:
        while len(found) < len(calls):
            found += _in_one_process(calls[len(found) :], seconds, environment or {}, Path(folder))
    return found


def _in_one_process(
    calls: Sequence[Call], seconds: float, environment: Mapping[str, str], folder: Path
) -> list[Outcome]:
    """At least one outcome: those up to the one that ends the process."""
    asked, answers, errors = folder / "calls.json", folder / "answers.jsonl", folder / "stderr"
    asked.write_text(json.dumps([sys.path, calls]))
    answers.write_text("")
    code = "import json, sys; sys.path[:] = json.load(open(sys.argv[1]))[0]; "
    code += "from fastdeit.pipelines.child import answer; answer(*sys.argv[1:])"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(asked), str(answers)], env=os.environ | dict(environment),
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        in_time = _wait(process, answers, len(calls), seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: it, its children and nothing else
        code_at_end = process.wait()
    found = [Outcome(*answer) for answer in _lines(answers)]
    if len(found) < len(calls):
        failure = _end_in_words(code_at_end, errors) if in_time else f"not finished after {seconds:g} s"
        found.append(Outcome(failure=failure, ended=True))
    return found


def _wait(process: subprocess.Popen, answers: Path, wanted: int, seconds: float) -> bool:
    """Until the process ends or a call takes longer than it may: then False."""
    done, since = 0, time.monotonic()
    while process.poll() is None:
        if (now := len(_lines(answers))) != done:
            done, since = now, time.monotonic()
        if done == wanted:
            return True  # how it takes itself down is no matter
        if time.monotonic() - since > seconds:
            return False
        time.sleep(POLL)
    return True


def _lines(answers: Path) -> list[list]:
    *whole, _ = answers.read_text().split("\n")
    return [json.loads(line) for line in whole]


def _end_in_words(code: int, errors: Path) -> str:
    if code < 0:
        return signal.Signals(-code).name
    said = errors.read_text(errors="replace").strip().split("\n")[-1][:300]
    return f"its process ended with exit code {code}" + (f": {said}" if said else "")


def answer(asked: str, answers: str) -> None:
    """The child's part: make the calls, and append [value, failure] to the file as each one ends."""
    for name, arguments in json.loads(Path(asked).read_text())[1]:
        module, _, function = name.partition(":")
        try:
            line = [getattr(importlib.import_module(module), function)(*arguments), None]
        except Exception as error:
            line = [None, f"{type(error).__name__}: {' '.join(str(error).split())}"]
        with open(answers, "a") as file:
            file.write(json.dumps(line) + "\n")
