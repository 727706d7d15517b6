"""How far a long job is: a bar on a terminal, now and then a plain line elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

SECONDS_BETWEEN_LINES = 10.0


class PlainProgress:
    """Prints a line every ten seconds, and one at the end. `finished` images count as done, not as speed."""

    def __init__(self, what: str, total: int, finished: int, stream: TextIO):
        self.what, self.total, self.finished, self.stream = what, total, finished, stream
        self.started = self.printed = time.monotonic()

    def update(self, done: int) -> None:
        if time.monotonic() - self.printed >= SECONDS_BETWEEN_LINES:
            self.print(done)

    def print(self, done: int) -> None:
        self.printed = time.monotonic()
        rate = (done - self.finished) / max(self.printed - self.started, 1e-9)
        left = f", {_duration((self.total - done) / rate)} left" if rate and done < self.total else ""
        share = done / self.total
        print(
            f"{self.what} {done:,} of {self.total:,} ({share:.1%}), {rate:,.0f}/s{left}", file=self.stream, flush=True
        )


@contextmanager
def show_progress(what: str, total: int, finished: int = 0, stream: TextIO | None = None) -> Iterator:
    """Yields an object whose update(done) shows that `done` of `total` are ready, `finished` of them from before."""
    stream = stream or sys.stderr
    if not stream.isatty():
        plain = PlainProgress(what, total, finished, stream)
        yield plain
        plain.print(total)
        return
    with _rich_bar(stream) as bar:
        task = bar.add_task(what, total=total, completed=finished)
        yield _BarUpdate(bar, task)
        bar.update(task, completed=total)


class _BarUpdate:
    def __init__(self, bar, task):
        self.bar, self.task = bar, task

    def update(self, done: int) -> None:
        self.bar.update(self.task, completed=done)


def _rich_bar(stream: TextIO):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(file=stream))


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{round(seconds)} s" if seconds < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
