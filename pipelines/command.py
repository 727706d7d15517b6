"""What the commands of this package share: help from a function's signature and docstring, and mistakes of the user
that end in one sentence and exit code 2. (fastdeit/command.py does it for the others, and is out of reach from here.)
"""

import os
import sys
from collections.abc import Callable
from typing import Annotated

from .bad_files import TooManyBadFiles

# What `pip install fastdeit` leaves out. Commands import these inside functions, so that a missing one is named here.
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
