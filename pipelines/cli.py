"""What the commands of this package share: help from a function's signature and docstring, and mistakes of the user
that end in one sentence and exit code 2. (fastdeit/command.py does it for the others, and is out of reach from here.)
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, TextIO

from .bad_files import TooManyBadFiles

EXTRA = {"matplotlib", "nvidia", "PIL", "pyarrow", "rich", "scipy", "tyro"}


def run(function: Callable[..., None], prog: str, positional: dict[str, str], *, stopped: str = "stopped") -> None:
    """Call `function` with the arguments of the command line. FASTDEIT_TRACEBACK=1 shows where an error came from.

    positional: what the help calls each positional parameter. stopped: what to say after Ctrl-C.
    """
    try:
        _call(function, prog, positional)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.exit(130)
    except (ModuleNotFoundError, OSError, ValueError, TooManyBadFiles) as error:
        message = _in_words(error)
        if message is None or os.environ.get("FASTDEIT_TRACEBACK") == "1":
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _call(function: Callable[..., None], prog: str, positional: dict[str, str]) -> None:
    import tyro

    for name, shown in positional.items():
        function.__annotations__[name] = Annotated[function.__annotations__[name], tyro.conf.arg(metavar=shown)]
    tyro.cli(function, prog=prog)


def _in_words(error: Exception) -> str | None:
    """What to tell the user, or None for a defect."""
    if isinstance(error, ModuleNotFoundError):
        known = (error.name or "").split(".")[0] in EXTRA
        return f"{error.name} is not installed: pip install 'fastdeit[train]' brings it" if known else None
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


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
