"""What a person sees of a run, and what stays of it: a progress bar or plain lines, metrics.jsonl, a tracker."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .notebook import NotebookBar, in_notebook
from .remaining import Remaining
from .trackers import Tracker

PLAIN_LINE_SECONDS = 30  # without a terminal: at most one line in this time between two epochs
QUICK_EPOCH_SECONDS = 2  # epochs without an evaluation: at most one line in this time

BAR_WIDTH = 50  # columns for the bar itself, the steps and the times


class Log:
    """What a run prints and writes. Only rank 0 does (elsewhere `folder` and `tracker` are None and `quiet` is on)."""

    def __init__(
        self, folder: Path | None, *, total_steps: int, title: str, quiet: bool = False,
        tracker: Tracker | None = None, remaining: Remaining | None = None,
    ):  # fmt: skip
        self.quiet, self.total_steps, self.title = quiet, total_steps, title
        # A notebook's output is text here, as a pipe's: rich would make a table of HTML of every line.
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=not sys.stdout.isatty(), force_jupyter=False)
        self.last_line = time.monotonic()
        self.remaining = remaining or Remaining(total_steps)
        self.lines = (folder / "metrics.jsonl").open("a", buffering=1) if folder else None
        self.tracker, self.disk_failed = tracker, False
        self.bar: Progress | NotebookBar | None = None
        if in_notebook() and not quiet:
            self.bar = NotebookBar()
        elif self.console.is_terminal and not quiet:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("left {task.fields[left]}", style="progress.remaining"), console=self.console,
                transient=True,
            )  # fmt: skip
        self.task = self.bar.add_task(title, total=total_steps, left="-:--:--") if self.bar is not None else None

    def begin(self) -> None:
        """Show the bar, which hides the cursor until `close`."""
        if self.bar is not None:
            self.bar.start()

    def stepped(self, step: int, images: int) -> None:
        """Of every step: the bar moves, and the first estimate of the time left is said. images: of a step."""
        self.remaining.stepped()
        if self.bar is not None:
            self.bar.update(self.task, completed=step, left=self.remaining.words(step))
        elif self.remaining.has_just_begun and (each := self.remaining.seconds_a_step):
            speed, left = f"{images / each:,.0f} images/s", f"left {self.remaining.words(step)}, by the first steps"
            self.say(f"  step {step}/{self.total_steps}  {speed}  {left}")

    def train(self, *, step: int, epoch: int, **figures) -> None:
        """Figures of the steps since the last call: losses, lr, images_per_s, data_share, seconds by phase."""
        self._write({"kind": "train", "step": step, "epoch": epoch, **figures})
        if self.bar is not None:
            text = bar_text(self.title, epoch, figures, self.console.width - BAR_WIDTH)
            self.bar.update(self.task, completed=step, description=text, left=self.remaining.words(step))
        elif time.monotonic() - self.last_line > PLAIN_LINE_SECONDS:
            parts = [f"  step {step}/{self.total_steps}", *_train_parts(figures), f"left {self.remaining.words(step)}"]
            self.say("  ".join(parts))

    def evaluated(
        self, *, step: int, epoch: int, epochs: int, figures: dict, seconds: float, accuracy: dict[str, dict]
    ) -> None:
        """Accuracies after an epoch: {"model": {"cls": top-1, ...}, "ema": {...}}, beside the last training figures and
        the seconds the evaluation took."""
        self._write(
            {"kind": "eval", "step": step, "epoch": epoch, "seconds": {"evaluation": round(seconds, 4)}, **accuracy}
        )
        top1, *others = [
            f"{'ema ' if source == 'ema' else ''}{head} {100 * value:.2f}"
            for source, heads in accuracy.items()
            for head, value in heads.items()
        ]
        self.epoch(step=step, epoch=epoch, epochs=epochs, figures=figures, results=[f"top-1 % {top1}", *others])

    def epoch(self, *, step: int, epoch: int, epochs: int, figures: dict, results: Sequence[str] = ()) -> None:
        """Say that an epoch has ended, with its last training figures and what came of it, if anything was measured;
        of epochs of a second or less that are not evaluated not every one."""
        if not results and time.monotonic() - self.last_line < QUICK_EPOCH_SECONDS:
            return
        parts = [
            f"epoch {epoch + 1:{len(str(epochs))}d}/{epochs}", *_train_parts(figures),
            f"left {self.remaining.words(step)}", *results,
        ]  # fmt: skip
        self.say(in_lines(parts, self.console.width) if self.console.is_terminal else "  ".join(parts))

    def say(self, text: str) -> None:
        self.last_line = time.monotonic()
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.lines is not None:
            self._on_disk(self.lines.close)
        self._track(lambda tracker: tracker.close())

    def _write(self, record: dict) -> None:
        if self.lines is not None:
            line = json.dumps(record | {"time": round(time.time(), 2)}) + "\n"
            self._on_disk(lambda: self.lines.write(line))
        figures = {f"{record['kind']}/{name}": value for name, value in _flat(record)}
        self._track(lambda tracker: tracker.log(record["step"], figures))

    def _on_disk(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:  # a full disk: what could not be written waits in memory for the next line
            if not self.disk_failed:
                self.say(f"warning: metrics.jsonl cannot be written ({error.strerror}); training continues")
            self.disk_failed = True

    def _track(self, action: Callable[[Tracker], None]) -> None:
        if self.tracker is None:
            return
        try:
            action(self.tracker)
        except Exception as error:  # a service that has gone away must not take the training with it
            self.tracker = None
            self.say(f"tracking has stopped, training continues; metrics.jsonl has everything ({error!r})")


def in_lines(parts: list[str], width: int) -> str:
    """The parts side by side, in as many lines as that takes; the first part stands alone at its edge."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) > width:
            lines.append(" " * len(parts[0]))
        lines[-1] += f"  {part}"
    return "\n".join(lines)


def bar_text(title: str, epoch: int, figures: dict, width: int) -> str:
    """What stands before the bar: as much as there is room for, or the bar would go."""
    text = f"{title}  epoch {epoch + 1}"
    for more in (
        f"loss {figures['loss']:.3f}",
        f"{figures['images_per_s']:,.0f} images/s",
        f"data {100 * figures['data_share']:.0f} %",
        f"lr {figures['lr']:.1e}",
    ):
        if len(text) + 2 + len(more) > width:
            break
        text += f"  {more}"
    return text


def _train_parts(figures: dict) -> list[str]:
    if not figures:
        return []
    names = {
        "class_loss": "class",
        "teacher_loss": "teacher",
        "attention_loss": "attention",
        "feature_loss": "features",
    }
    terms = ", ".join(f"{name} {figures[key]:.3f}" for key, name in names.items() if figures.get(key))
    terms = f" ({terms})" if "," in terms else ""
    return [
        f"loss {figures['loss']:.3f}{terms}", f"lr {figures['lr']:.1e}", f"{figures['images_per_s']:,.0f} images/s",
        f"data {100 * figures['data_share']:.0f} %",
    ]  # fmt: skip


def _flat(record: dict, prefix: str = ""):
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "step":
            yield prefix + key, value


class PhaseTimer:
    """`enter(phase)` ends the phase before; `stop()` ends the last one; `read()` gives the seconds of each.

    On the CPU the stamps are the clock's. On CUDA they are events in the current stream, so a phase is the time the GPU
    spent in it, idle or busy: loading a batch costs nothing for as long as the GPU still has work queued.
    """

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.stamps: list[tuple[str | None, object]] = []  # None: between two phases
        self.spare_events: list[torch.cuda.Event] = []

    def enter(self, phase: str | None) -> None:
        if self.on_cuda and torch.cuda.is_current_stream_capturing():
            return  # what a graph repeats has no times of its own
        self.stamps.append((phase, self._stamp()))

    def stop(self) -> None:
        self.enter(None)

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last call. On CUDA only after the host has waited for the device anyway: the
        events are then in the past, and reading them waits for nothing."""
        seconds: dict[str, float] = {}
        for (phase, start), (_, end) in zip(self.stamps, self.stamps[1:]):
            if phase is not None:
                seconds[phase] = seconds.get(phase, 0.0) + self._between(start, end)
        if self.on_cuda:
            self.spare_events += [event for _, event in self.stamps]
        self.stamps = []
        return seconds

    def _stamp(self):
        if not self.on_cuda:
            return time.perf_counter()
        event = self.spare_events.pop() if self.spare_events else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start, end) -> float:
        return start.elapsed_time(end) / 1000 if self.on_cuda else end - start
