"""Files that are either complete or not there, after a full disk, a kill or a power cut alike.

A rename is atomic but promises nothing about the bytes behind the name, nor that the new name itself is on the disk:
so the file is flushed before the rename, and the folder after it.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

UNFINISHED = ".unfinished"  # ends the name of what is being written; what a kill leaves behind is known by it


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Create or overwrite a file and wait until its bytes are on the disk; not atomic."""
    with path.open("wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems flush files only
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, content: bytes) -> None:
    """Put `content` in the place of a file, or create it; a reader finds the old content or the new, never a part, and
    of two processes that write at the same time the content of one."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        write(unfinished, lambda file: file.write(content))
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def replace_json(path: Path, content) -> None:
    replace(path, (json.dumps(content, indent=2) + "\n").encode())


def point(link: Path, target: Path) -> None:
    """Make `link` lead to `target`, in one move when it led elsewhere before."""
    unfinished = link.with_name(link.name + UNFINISHED)
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(os.path.relpath(target, link.parent))
    unfinished.replace(link)
    flush_folder(link.parent)
