"""When a run is saved, when it leaves because a signal came, and how it stops before a step that is not finite.

What one process knows (a signal came, ten minutes have passed, a loss is not finite) all must act on at the same step.
It travels with the losses, in one small sum over the processes at each step, and the host reads it when the device has
long computed it: in the same step on the CPU, some steps later on a GPU.
"""

import shlex
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastdeit.checkpoint import files
from fastdeit.checkpoint.async_writer import AsyncWriter
from fastdeit.distributed.signals import SIGNALS

from . import nonfinite
from .log import Log
from .trainer import Trainer

LAG = {"cuda": 2}  # steps, by type of device; elsewhere none


class Checkpointing:
    """The policy around the steps. As a context it lets an interrupted process wait for what is being written.

    index: of the training images, to name those of a bad step
    folder: of the run; None in processes that write nothing
    log: takes sentences, and is closed before the process leaves
    describe: what config.json says of the run at this moment
    """

    def __init__(self, trainer: Trainer, index, folder: Path | None, log: Log, describe: Callable[[], dict]):
        run, world = trainer.config.run, trainer.world
        self.trainer, self.state, self.world, self.index = trainer, trainer.state, world, index
        self.folder, self.log, self.describe = folder, log, describe
        self.every_seconds = 60 * run.checkpoint_minutes
        self.keep_steps = run.keep_epochs * trainer.steps_per_epoch
        self.writer = AsyncWriter(folder, log.say, run.keep_count)
        self.reader = DelayedReader(LAG.get(world.device.type, 0))
        self.no_wishes = torch.zeros(len(SIGNALS) + 1, device=world.device)
        self.signal: int | None = None  # what all processes have agreed to obey
        self.bad_steps = 0  # met so far, as far as the host knows
        self.saved_step: int | None = None
        self.saved_at = time.monotonic()

    # -----------------------------------------------------------------------------------------------------------------
    # At each step

    def exchange(self, own_losses: Tensor) -> Tensor:
        """Tell the other processes this one's losses (terms,) and wishes. Returns the mean losses of all."""
        total = self.world.sum(torch.cat([own_losses, self._wishes()]))
        self.wishes = total[len(own_losses) :]
        return total[: len(own_losses)] / self.world.world_size

    def _wishes(self) -> Tensor:
        wishes = [float(self.world.stop.received == number) for number in SIGNALS]
        wishes.append(float(self.world.is_main and time.monotonic() - self.saved_at > self.every_seconds))
        return torch.tensor(wishes, device=self.world.device) if any(wishes) else self.no_wishes

    def after_step(self, batch) -> None:
        """Send what the step's exchange said on its way to the host, and with it which images the step saw."""
        self.reader.put(torch.cat([self.wishes, self.trainer.guard.count.float().view(1)]), batch.indices)

    def look(self, *, everything: bool = False) -> bool:
        """Read what has arrived; with `everything` all that was sent, which waits for the device. Returns whether it is
        time to save (and perhaps to leave). Raises NonFinite."""
        due = False
        for (*wishes, bad_steps), indices in self.reader.read(everything=everything):
            if bad_steps > self.bad_steps:
                self._bad_step(indices)
            for number, wish in zip(SIGNALS, wishes):
                if wish and self.signal is None:
                    self.signal = number
            due |= any(wishes)
        return due

    def _bad_step(self, indices: Tensor) -> None:
        """Report it. If no more are tolerated, save the state before it and raise."""
        number, guard = self.bad_steps, self.trainer.guard
        names = [self.index.name(i) for i in indices.tolist()]
        is_skipped = number < guard.tolerated
        text = nonfinite.report(guard, number, names, self.world, self.folder, skipped=is_skipped)
        if is_skipped:
            self.bad_steps += 1
            self.log.say(f"warning: {text}; skipped ({number + 1} of {guard.tolerated})")
            return
        self.reader.clear()  # steps after this one changed nothing
        self.state.step = guard.rewind(number)
        self.save()
        self.writer.close()
        where = ""
        if self.folder is not None:
            again = files.to_resume(self.folder)
            where = f"{self.folder}/last holds the state before it; --resume {again} repeats it. "
        raise nonfinite.NonFinite(
            f"{text}. The step was not applied. {where}A lower --lr, or --clip-grad, may help; --skip-nonfinite N "
            "skips up to N such steps"
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Saving and leaving

    def save(self) -> None:
        """Hand the state to the writer, unless it has it already; then leave if a signal came. All processes call."""
        self.look(everything=True)
        step = self.state.step
        if self.saved_step != step:
            keep = bool(self.keep_steps) and step % self.keep_steps == 0
            self.writer.save(self.trainer.tensors(), self.describe(), step=step, keep=keep)
            self.saved_step = step
        self.saved_at = time.monotonic()
        if self.signal is not None:
            self._leave()

    def poll(self, polled: bool) -> None:
        """Whether from now on a signal waits until `look` reads of it, or ends the process at once (all is saved)."""
        self.world.stop.polled = polled
        if not polled and self.world.stop.received is not None:
            self._leave()

    def note(self, accuracies: dict, *, best: bool) -> None:
        """Put the accuracies of the state just saved beside it."""
        additions = {"accuracy": accuracies, "progress": self.describe()["progress"]}
        self.writer.note(self.state.step, additions, best=best)

    def _leave(self) -> None:
        self.writer.wait()
        if self.folder is not None:
            self.log.say(self.outcome())
        self.world.stop.last_words = None
        self.log.close()
        if self.signal is not None:  # all leave together: one that ends early makes torchrun end the others
            self.world.barrier()
        self.world.stop.leave(self.signal)

    def outcome(self) -> str:
        """What of the run is on the disk, and the command that resumes it; "" where nothing is written."""
        if self.folder is None:
            return ""
        last = self.folder / "last"
        if self.writer.failure is not None:
            outcome = f"not saved: {self.writer.failure}"
        elif last.exists():
            outcome = f"saved at step {files.description(last)['step']} of {self.trainer.total_steps}"
        else:
            outcome = "nothing is trained yet"
        start = "python" if self.world.world_size == 1 else "the same launcher,"
        folder = shlex.quote(str(files.to_resume(self.folder)))
        return f"{outcome}; resume by: {start} -m fastdeit.train --resume {folder}"

    def load(self, description: dict) -> None:
        """Take over from a checkpoint's description what concerns this policy."""
        self.saved_step = description["step"]
        self.bad_steps = description["progress"]["skipped"]
        self.trainer.guard.count.fill_(self.bad_steps)

    def __enter__(self) -> "Checkpointing":
        self.world.stop.before_exit, self.world.stop.last_words = self.writer.wait, self.outcome
        return self

    def __exit__(self, kind, *_) -> None:
        self.writer.wait()
        self.world.stop.before_exit = self.world.stop.last_words = None
        self.world.stop.polled = False
        if kind is None:
            self.writer.close()


class DelayedReader:
    """Numbers from the device that the host reads `lag` steps later, when they have long been computed: it then waits
    for a step that the device has left behind, not for the one it is at. Every process reads the same step's numbers at
    the same step."""

    def __init__(self, lag: int):
        self.lag, self.waiting = lag, deque()

    def put(self, tensor: Tensor, note=None) -> None:
        """tensor: small, of one step. note: comes back with its numbers."""
        event = None
        if tensor.is_cuda:
            tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.waiting.append((tensor, event, note))

    def read(self, *, everything: bool = False):
        """Yields (numbers, note) of the steps that are due, oldest first; with `everything` of all."""
        while len(self.waiting) > (0 if everything else self.lag):
            tensor, event, note = self.waiting.popleft()
            if event is not None:
                event.synchronize()
            yield tensor.tolist(), note

    def clear(self) -> None:
        self.waiting.clear()
