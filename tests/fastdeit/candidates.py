"""Candidates for the tuner that take time, and a tuner that measures them quickly."""

import time
from dataclasses import replace

import pytest
import torch

from fastdeit.distributed.world import World
from fastdeit.tuning import Tuner, timing

CPU = torch.device("cpu")
RESULT = torch.arange(12.0).view(3, 4)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)  # AT_LEAST rounds


def taking(milliseconds, result=RESULT, calls=None):
    """A candidate whose calls take so long."""

    def build():
        def call():
            if calls is not None:
                calls.append(milliseconds)
            if milliseconds:  # sleep(0) gives the core away
                time.sleep(milliseconds / 1000)
            return result.clone()

        return call

    return build


def raising(error):
    def build():
        raise error

    return build


def ask(tuner, candidates, *, question="which", default="plain", key=None, dtype=torch.float32, **options):
    return tuner.choose(
        question, candidates, default=default, key={"shape": [3, 4], **(key or {})}, dtype=dtype, **options
    )


@pytest.fixture(name="tuner")
def measuring_tuner(tmp_path):
    return Tuner(World(CPU), measures=True, file=tmp_path / "deep" / "tuning.json")


def excluded(choice):
    return {row.candidate: row.excluded for row in choice.rows if row.excluded}


def again(tuner, **changes):
    """The same tuner in a later run."""
    return replace(tuner, choices=[], **changes)


FAST, SLOW = {"plain": taking(10), "other": taking(1)}, {"plain": taking(1), "other": taking(10)}
