"""What every command shares: a mistake of the user's ends in one sentence and exit code 2, never in a traceback."""

import os
import sys
from collections.abc import Callable

# What `pip install fastdeit` leaves out. Commands import these inside `main`, so that a missing one is named here.
EXTRA = {"matplotlib", "nvidia", "PIL", "pyarrow", "rich", "safetensors", "sklearn", "timm", "torchvision", "tyro"}


class UserError(Exception):
    """Something the user can put right. The message names the thing and the remedy."""


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with its code.

    A `UserError`, and a `ValueError` raised by a line of this package, is printed as one sentence (exit code 2).
    Everything else is a defect and keeps its traceback. FASTDEIT_TRACEBACK=1 shows the traceback always.
    """
    try:
        code = main()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in EXTRA:
            raise
        print(f"error: {error.name} is not installed: pip install 'fastdeit[train]' brings it", file=sys.stderr)
        code = 2
    except (UserError, ValueError) as error:
        if os.environ.get("FASTDEIT_TRACEBACK") == "1" or not (isinstance(error, UserError) or _raised_here(error)):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    sys.exit(code)


def _raised_here(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return module == "__main__" or module.split(".")[0] == "fastdeit"
