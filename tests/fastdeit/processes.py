"""Runs in processes of their own, for what a process does not survive: signals, kills, lost ranks.

They are forked from one server that has imported everything, so starting one takes no seconds of importing.
"""

import multiprocessing
import os
import pkgutil
import signal
import socket
import time

import pytest
import torch

from fastdeit import errors
from fastdeit.pipelines.decode import prefetch  # noqa: F401  DALI, for the server to import

from . import runs

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["fastdeit.train", "torch.distributed.fsdp", __name__])


class Child:
    """One process of a run. `first`: called in it before all else; `on_micro_batch`: see Trainer."""

    def __init__(self, *arguments, log, first=None, on_micro_batch=None, environment=None):
        pytest.importorskip("tyro")
        pytest.importorskip("nvidia.dali")
        self.log = log
        arguments = [str(argument) for argument in arguments]
        what = (arguments, str(log), first, on_micro_batch, environment or {})
        self.process = context.Process(target=_run, args=what)
        self.process.start()

    def wait(self, seconds=60) -> int:
        """The exit code, as a shell tells it: 128 + number for a signal."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            pytest.fail(f"still running after {seconds} s:\n{self.text}")
        code = self.process.exitcode
        return 128 - code if code < 0 else code

    def kill(self, number=signal.SIGKILL) -> None:
        os.kill(self.process.pid, number)

    @property
    def text(self) -> str:
        return self.log.read_text()


def _run(arguments, log, first, on_micro_batch, environment) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    if first is not None:
        first()
    errors.run(lambda: runs.run(*arguments, on_micro_batch=on_micro_batch) and None)


def start_ranks(world_size, *arguments, logs, first=None, on_micro_batch=None, **environment):
    """`world_size` processes of one run, as torchrun would start them. on_micro_batch: by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port, **environment}
    environment["MASTER_ADDR"] = "127.0.0.1"
    return [
        Child(
            *arguments,
            log=logs / f"rank{rank}.txt",
            first=first,
            on_micro_batch=(on_micro_batch or {}).get(rank),
            environment={**environment, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in range(world_size)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What is to happen in a child, and when


class At:
    """on_micro_batch: do `action` when a step begins (picklable)."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def __call__(self, trainer):
        if trainer.state.step == self.step:
            self.action()


class Within:
    """first: do `action` when a function is called; `owner`: a module or class, as "fastdeit.train:Class"."""

    def __init__(self, owner, name, action):
        self.owner, self.name, self.action = owner, name, action

    def __call__(self):
        owner = pkgutil.resolve_name(self.owner)
        called, action = getattr(owner, self.name), self.action

        def call_and_act(*args, **kwargs):
            action()
            return called(*args, **kwargs)

        setattr(owner, self.name, call_and_act)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_and_hang() -> None:
    terminate()
    time.sleep(600)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def user_signal() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise RuntimeError("the planned failure")
