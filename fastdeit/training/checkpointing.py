"""Keeps a run safe: saves when it is time, leaves when a signal says so, stops before a bad step is lost.

What one process knows (a signal came, ten minutes have passed, a loss is not finite) all must act on at the same step.
It travels with the losses, in one small sum over the processes at each step, and the host reads it when the device has
long computed it: in the same step on the CPU, LAG steps later on a GPU.
"""

import shlex
import time
from collections import deque

import torch

from fastdeit.checkpoint import files
from fastdeit.checkpoint.async_writer import Saver
from fastdeit.distributed.signals import SIGNALS

from . import nonfinite

LAG = 2  # steps


class Keeper:
    def __init__(self, trainer):
        config, world = trainer.config, trainer.world
        self.trainer, self.world, self.folder = trainer, world, trainer.folder
        self.every_seconds, self.keep_epochs = 60 * config.run.checkpoint_minutes, config.run.keep_epochs
        self.saver = Saver(trainer.folder, trainer.log.say, config.run.keep_count)
        lag = LAG if world.device.type == "cuda" else 0
        self.later = Later(lag)
        self.recent = nonfinite.Recent(trainer.train_loader.index, length=lag + 1)
        self.silence = torch.zeros(len(SIGNALS) + 1, device=world.device)
        self.signal: int | None = None  # what all processes have agreed to obey
        self.bad_steps = 0
        self.saved_step: int | None = None
        self.saved_at = time.monotonic()

    # -----------------------------------------------------------------------------------------------------------------
    # At each step

    def exchange(self, batch, own_losses: torch.Tensor) -> torch.Tensor:
        """Tell the others this process's losses (terms,) and wishes. Returns the mean losses of all processes."""
        self.recent.add(self.trainer.steps_done, batch)
        self.sent = self.world.sum(torch.cat([own_losses, self._wishes()]))
        return self.sent[: len(own_losses)] / self.world.world_size

    def _wishes(self) -> torch.Tensor:
        wishes = [float(self.world.stop.received == number) for number in SIGNALS]
        wishes.append(float(self.world.is_main and time.monotonic() - self.saved_at > self.every_seconds))
        return torch.tensor(wishes, device=self.world.device) if any(wishes) else self.silence

    def after_step(self) -> None:
        self.later.put(torch.cat([self.sent[-len(self.silence) :], self.trainer.guard.count.float().view(1)]))

    def look(self, *, everything: bool = False) -> bool:
        """Read what has been exchanged: so far that the device has left it behind, or everything, which waits for it.
        Returns whether it is time to save (and to leave). Raises NonFinite."""
        due = False
        for *wishes, bad_steps in self.later.read(everything=everything):
            while self.bad_steps < bad_steps:
                self._bad_step()
            for number, wish in zip(SIGNALS, wishes):
                if wish and self.signal is None:
                    self.signal = number
            due |= any(wishes)
        return due

    def _bad_step(self) -> None:
        number, tolerated = self.bad_steps, self.trainer.guard.tolerated
        self.bad_steps += 1
        skipped = number < tolerated
        text = nonfinite.report(self.trainer.guard, number, self.recent, self.world, self.folder, skipped=skipped)
        if skipped:
            self.trainer.log.say(f"warning: {text}; skipped ({number + 1} of {tolerated})")
            return
        self.later.waiting.clear()  # steps after this one changed nothing
        self.bad_steps = number
        self.trainer.guard.count.fill_(number)
        self.trainer.steps_done = self.trainer.guard.incident(number)[0]
        self.save()
        self.saver.close()
        where = ""
        if self.folder is not None:
            again = files.to_resume(self.folder)
            where = f"{self.folder}/last holds the state before it; --resume {again} repeats it. "
        raise nonfinite.NonFinite(
            f"{text}. The step was not applied. {where}A lower --lr, or --clip-grad, may help; --skip-nonfinite N "
            "leaves out up to N such steps"
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Saving and leaving

    def save(self) -> None:
        """Hand the state to the writer, unless it is there already; then leave if a signal came. All processes call."""
        self.look(everything=True)
        trainer = self.trainer
        if self.saved_step != trainer.steps_done:
            step = trainer.steps_done
            self.saver.save(trainer.tensors(), trainer.description(), step=step, keep=self._is_kept(step))
            self.saved_step = trainer.steps_done
        self.saved_at = time.monotonic()
        if self.signal is not None:
            self._leave()

    def poll(self, polled: bool) -> None:
        """Whether from now on a signal waits until `look` reads of it, or ends the process at once (all is saved)."""
        self.world.stop.polled = polled
        if not polled and self.world.stop.received is not None:
            self._leave()

    def _is_kept(self, step: int) -> bool:
        epochs, rest = divmod(step, self.trainer.steps_per_epoch)
        return bool(self.keep_epochs) and rest == 0 and epochs % self.keep_epochs == 0

    def note(self, accuracies: dict, *, best: bool) -> None:
        """Put the accuracies of the state just saved beside it."""
        additions = {"accuracy": accuracies, "progress": self.trainer.description()["progress"]}
        self.saver.note(self.trainer.steps_done, additions, best=best)

    def _leave(self) -> None:
        self.saver.wait()
        if self.folder is not None:
            self.trainer.log.say(self.standing())
        self.world.stop.last_words = None
        self.trainer.log.close()
        if self.signal is not None:  # all leave together: one that ends early makes torchrun end the others
            self.world.barrier()
        self.world.stop.leave(self.signal)

    def standing(self) -> str:
        """What of the run is on the disk, and the command that resumes it. Where nothing is written: nothing."""
        if self.folder is None:
            return ""
        last = self.folder / "last"
        if self.saver.failure is not None:
            state = f"not saved: {self.saver.failure}"
        elif last.exists():
            state = f"saved at step {files.description(last)['step']} of {self.trainer.total_steps}"
        else:
            state = "nothing is trained yet"
        start = "python" if self.world.world_size == 1 else "the same launcher,"
        folder = shlex.quote(str(files.to_resume(self.folder)))
        return f"{state}; resume by: {start} -m fastdeit.train --resume {folder}"

    def loaded(self, saved: dict) -> None:
        """Take over from a checkpoint what concerns the keeping."""
        self.saved_step = saved["description"]["step"]
        self.bad_steps = saved["description"]["progress"]["skipped"]

    def __enter__(self) -> "Keeper":
        self.world.stop.before_exit, self.world.stop.last_words = self.saver.wait, self.standing
        return self

    def __exit__(self, kind, *_) -> None:
        self.saver.wait()
        self.world.stop.before_exit = self.world.stop.last_words = None
        self.world.stop.polled = False
        if kind is None:
            self.saver.close()


class Later:
    """`put` a small tensor at each step, `read` those at least `lag` steps old: the host then waits for a step that the
    device has left behind, not for the one it is at. Every process reads the same step's numbers at the same step."""

    def __init__(self, lag: int):
        self.lag, self.waiting = lag, deque()

    def put(self, tensor: torch.Tensor) -> None:
        event = None
        if tensor.is_cuda:
            tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.waiting.append((tensor, event))

    def read(self, *, everything: bool = False) -> list[list[float]]:
        """The numbers that are due, oldest first; with `everything` all of them, which waits for the device."""
        numbers = []
        while len(self.waiting) > (0 if everything else self.lag):
            tensor, event = self.waiting.popleft()
            if event is not None:
                event.synchronize()
            numbers.append(tensor.tolist())
        return numbers
