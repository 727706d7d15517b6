"""Mistakes of the user: one sentence that names the thing and the remedy, and exit code 2, never a traceback."""

import errno
import os
import sys
from collections.abc import Callable

# What `pip install fastdeit` leaves out. Commands import these inside `main`, so that a missing one is named here.
EXTRA = {
    "matplotlib", "nvidia", "PIL", "pyarrow", "rich", "safetensors", "scipy", "sklearn", "timm", "torchvision", "tyro",
}  # fmt: skip


class UserError(Exception):
    """Something the user can put right. The message names the thing and the remedy."""


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with its code.

    An exception type of this package (`UserError`, `TooManyBadFiles`, ...) and a `ValueError` raised by a line of it
    end in one sentence and exit code 2. Everything else is a defect and keeps its traceback; FASTDEIT_TRACEBACK=1 shows
    it always.
    """
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at the end
        code = 0
    except Exception as error:
        message = in_words(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        code = 2
    sys.exit(code)


def tell(sentence: str) -> None:
    """Say what is to be known beside the command's output; of several processes the first does."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(sentence, file=sys.stderr, flush=True)


def in_words(error: Exception) -> str | None:
    """What to tell the user, or None for a defect."""
    if os.environ.get("FASTDEIT_TRACEBACK") == "1":
        return None
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in EXTRA:
        return f"{error.name} is not installed: pip install 'fastdeit[train]' brings it"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}: make room, and go on with a run by --resume"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        return f"{error.filename}: {error.strerror}; choose another place, or see to the permissions of this one"
    if isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError)) and error.filename:
        return f"{error.filename}: {error.strerror}; choose another place"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by name: not every command has imported torch
        wanted = ". ".join(str(error).split(". ")[:2]).rstrip(".")
        return (
            f"the GPU's memory does not suffice ({wanted}): lower --batch-size; in training --accumulate makes up for "
            "it, and --grad-checkpointing takes less memory too"
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
