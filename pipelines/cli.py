"""What the commands of this package share: the command line from a function's signature and docstring, user errors as
one sentence with exit code 2, and the progress bar.
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
    """Call `function` with the arguments of the command line. FASTDEIT_TRACEBACK=1 shows the traceback of an error.

    positional: the name of each positional parameter in the help. stopped: the message after Ctrl-C.
    """
    try:
        _call(function, prog, positional)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.exit(130)
    except (ModuleNotFoundError, OSError, ValueError, TooManyBadFiles) as error:
        message = _message_of(error)
        if message is None or os.environ.get("FASTDEIT_TRACEBACK") == "1":
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _call(function: Callable[..., None], prog: str, positional: dict[str, str]) -> None:
    import tyro

    for name, shown in positional.items():
        function.__annotations__[name] = Annotated[function.__annotations__[name], tyro.conf.arg(metavar=shown)]
    tyro.cli(function, prog=prog)


def _message_of(error: Exception) -> str | None:
    """The message for the user, None for a defect."""
    if isinstance(error, ModuleNotFoundError):
        known = (error.name or "").split(".")[0] in EXTRA
        return f"{error.name} is not installed: pip install 'fastdeit[train]' brings it" if known else None
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def show_progress(
    what: str, total: int, finished: int = 0, stream: TextIO | None = None
) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, elsewhere a line every ten seconds and one at the end. Yields update(done).

    finished: how many of `total` were done before; they count as done, not as speed
    """
    stream = stream or sys.stderr
    if stream.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(file=stream)) as bar:
            task = bar.add_task(what, total=total, completed=finished)
            yield lambda done: bar.update(task, completed=done)
            bar.update(task, completed=total)
    else:
        lines = _Lines(what, total, finished, stream)
        yield lines.update
        lines.print(total)


class _Lines:
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
        text = f"{self.what} {done:,} of {self.total:,} ({done / self.total:.1%}), {rate:,.0f}/s{left}"
        print(text, file=self.stream, flush=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{round(seconds)} s" if seconds < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
