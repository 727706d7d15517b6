"""Checkpoints on their way to the disk: copied in a moment, written by a thread while training continues."""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from fastdeit.distributed.parallel import full
from fastdeit.errors import UserError

from . import files


class Snapshot:
    """Copies, in host memory, of trees of tensors: dictionaries and lists, however deep.

    From a GPU they go to pinned memory without stopping the host: `take` returns at once, and `wait` when they have
    arrived. The memory is used again by the next `take`.
    """

    def __init__(self):
        self.memory: dict[tuple, torch.Tensor] = {}
        self.device: torch.device | None = None  # the GPU that the tensors are on
        self.ready: torch.cuda.Event | None = None

    def take(self, tree, *, here: bool = True):
        """The tree with every tensor copied; sharded tensors become full ones (all processes must
        call), and where `here` is False nothing is kept."""
        copied = self._copy(tree, (), here)
        if self.device is not None:
            self.ready = torch.cuda.Event()
            self.ready.record(torch.cuda.current_stream(self.device))
        return copied if here else None

    def wait(self) -> None:
        """From any thread: its current device is the first GPU, where waiting would set up a context."""
        if self.ready is not None:
            with torch.cuda.device(self.device):
                self.ready.synchronize()

    def _copy(self, tree, path: tuple, here: bool):
        if isinstance(tree, dict):
            return {key: self._copy(value, (*path, key), here) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return type(tree)(self._copy(value, (*path, i), here) for i, value in enumerate(tree))
        if not isinstance(tree, torch.Tensor):
            return tree
        tensor = full(tree.detach())
        return self._to_memory(tensor, path) if here else None

    def _to_memory(self, tensor: torch.Tensor, path: tuple) -> torch.Tensor:
        memory = self.memory.get(path)
        if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
            memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.memory[path] = memory
        if tensor.is_cuda:
            self.device = tensor.device
        return memory.copy_(tensor, non_blocking=True)


class AsyncWriter:
    """Writes the checkpoints of one run. `run` is None in the processes that write none.

    A checkpoint that cannot be written (the disk is full) is reported by `say`, and training continues: `last` stays
    where it was, the next checkpoint is tried when it is due, and `close` complains if the last one failed.
    """

    def __init__(self, run: Path | None, say: Callable[[str], None], keep_count: int | None = None):
        self.run, self.say, self.keep_count = run, say, keep_count
        self.snapshot, self.failure = Snapshot(), None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="fastdeit-saver")
        self.at_work: list[Future] = []
        self.lock = threading.RLock()  # the thread that listens for signals waits too

    def save(self, tensors: dict, description: dict, *, step: int, keep: bool) -> None:
        """`tensors`: {"model", "ema", "training"}, see checkpoint.save. All processes call if tensors are sharded."""
        self.wait()  # the snapshot's memory is about to be used again
        copied = self.snapshot.take(tensors, here=self.run is not None)
        if self.run is not None:
            self._submit(self._write, copied, description, step, keep)

    def note(self, step: int, additions: dict, *, best: bool) -> None:
        """Add to the description of the checkpoint of `step`; `best` then points to it if it is."""
        if self.run is not None:
            self._submit(files.note, self.run, step, additions, best=best, keep_count=self.keep_count)

    def wait(self) -> None:
        """Until everything is on the disk, or has failed."""
        with self.lock:
            while self.at_work:
                try:
                    self.at_work.pop(0).result()
                except OSError as error:
                    self._report(error)

    def close(self) -> None:
        """Wait, and raise UserError if the last checkpoint is not on the disk."""
        self.wait()
        if self.failure is not None:
            raise UserError(f"{self.failure}; make room and resume with --resume {files.to_resume(self.run)}")

    def _submit(self, work: Callable, *arguments, **options) -> None:
        with self.lock:
            self.at_work.append(self.thread.submit(work, *arguments, **options))

    def _write(self, tensors: dict, description: dict, step: int, keep: bool) -> None:
        self.snapshot.wait()
        try:
            files.save(self.run, description, step=step, keep=keep, keep_count=self.keep_count, **tensors)
            self.failure = None
        except OSError as error:
            self._report(error, step)

    def _report(self, error: OSError, step: int | None = None) -> None:
        last = self.run / "last"
        stands = f"{last} stays at {last.resolve().name}" if last.exists() else "there is none before it"
        free = shutil.disk_usage(self.run).free / 2**20
        what = f"the checkpoint of step {step}" if step is not None else "the description of a checkpoint"
        self.failure = f"{what} could not be written ({error.strerror or error}; {free:,.0f} MiB free); {stands}"
        self.say(f"warning: {self.failure}; training continues")
