"""Errors that the user can correct: one sentence with a remedy and exit code 2, never a traceback."""

import errno
import os
import sys
from collections.abc import Callable

# Not installed by `pip install fastdeit`. Commands import these inside `main`, so that a missing one is named here.
EXTRA = {
    "matplotlib", "nvidia", "PIL", "pyarrow", "rich", "safetensors", "scipy", "sklearn", "timm", "torchvision", "tyro",
    "yaml",
}  # fmt: skip


class UserError(Exception):
    """Something the user can correct. The message names it and the remedy."""


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with its code.

    An exception type of this package (`UserError`, `TooManyBadFiles`, ...) and a `ValueError` raised in it end in one
    sentence and exit code 2. Everything else is a bug and keeps its traceback; with FASTDEIT_TRACEBACK=1 all do.
    """
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at exit
        code = 0
    except Exception as error:
        message = in_words(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        code = 2
    sys.exit(code)


def tell(sentence: str) -> None:
    """Print a remark to stderr; of several processes only the first does."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(sentence, file=sys.stderr, flush=True)


def in_words(error: Exception) -> str | None:
    """What to tell the user, or None for a bug."""
    if os.environ.get("FASTDEIT_TRACEBACK") == "1":
        return None
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in EXTRA:
        return f"{error.name} is not installed: pip install 'fastdeit[train]' brings it"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}: make room, then resume a run with --resume"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        return f"{error.filename}: {error.strerror}; choose another path, or change its permissions"
    if isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError)) and error.filename:
        return f"{error.filename}: {error.strerror}; choose another path"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by name: not every command has imported torch
        wanted = ". ".join(str(error).split(". ")[:2]).rstrip(".")
        return (
            f"the GPU is out of memory ({wanted}): lower --batch-size; in training --accumulate keeps the batch of a "
            "step the same, and --grad-checkpointing takes less memory"
        )
    if _is_ours(type(error).__module__) or (isinstance(error, ValueError) and _is_ours(_raising_module(error))):
        return " ".join(str(error).split())
    return None


def _is_ours(module: str) -> bool:
    return module == "__main__" or module.split(".")[0] == "fastdeit"


def _raising_module(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
