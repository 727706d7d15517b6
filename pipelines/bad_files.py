"""Bad images: each reported once by name and cause, listed in a file, tolerated up to a limit.

A file can be bad when it is indexed (index.bad: empty, not an image, an unsupported format) or when it is decoded
(truncated, vanished). Both are reported here:

    bad_files = BadFiles.of(index, path="runs/1/bad_files.txt")     # includes index.bad
    bad_files.report(index.name(i), "truncated")
"""

import logging
import os
import re
import threading
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

log = logging.getLogger(__name__)

LOGGED = 20  # further names are only written to the file, to keep the log readable


class BadFile(NamedTuple):
    name: str
    cause: str
    images: int = 1  # lost with it; estimated for a shard


class TooManyBadFiles(RuntimeError):
    """More images are bad than the limit allows."""


class NoImages(ValueError):
    """No image can be read. bad: the bad files, where they were not reported to a BadFiles."""

    def __init__(self, message: str, bad: tuple = ()):
        super().__init__(message)
        self.bad = bad


class DecodeError(Exception):
    """A batch could not be decoded: at least one of its images is bad. Later batches are not affected."""


class Indexed(Protocol):
    """An index, as far as it matters here."""

    @property
    def bad(self) -> Sequence[BadFile]: ...
    def __len__(self) -> int: ...


class BadFiles:
    """Counts bad images and raises TooManyBadFiles when they exceed a fraction of all. A shard counts with its images,
    estimated where their number is not known.

    total: number of images, good and bad
    limit: the largest fraction of them, in [0, 1], that may be bad
    path: file to which lines "NAME<tab>CAUSE" are appended, None for none; tabs, line ends and backslashes in a name
        are escaped with a backslash. Names already in the file are not written again, so a resumed run continues the
        list; they count only if this run finds them bad again.

    Each process of a distributed run counts the bad images it finds; all may append to one path. Thread-safe.
    """

    def __init__(self, total: int, *, limit: float = 0.01, path: str | os.PathLike | None = None):
        if not 0 <= limit <= 1:
            raise ValueError(f"the limit of bad files must be a fraction from 0 to 1, got {limit}")
        self.total, self.limit = total, limit
        self.path = None if path is None else Path(path)
        self.images = 0  # bad ones so far
        self.causes: dict[str, str] = {}  # by name, in the order they were found
        self.listed = self._read_names()  # in the file at `path`, by this run or an earlier part of it
        self._lock = threading.Lock()

    @classmethod
    def of(cls, index: Indexed, *, limit: float = 0.01, path: str | os.PathLike | None = None) -> "BadFiles":
        """For the images of an index; those found bad by indexing are reported at once."""
        bad_files = cls(len(index) + sum(bad.images for bad in index.bad), limit=limit, path=path)
        for bad in index.bad:
            bad_files._add(*bad)
        bad_files._check()
        return bad_files

    def __len__(self) -> int:
        """The number of bad files, where a shard is one; `images` is the number of images."""
        return len(self.causes)

    def __contains__(self, name: str) -> bool:
        return name in self.causes

    def report(self, name: str, cause: str) -> None:
        """Count, log and list a bad image, once for each name. Raises TooManyBadFiles."""
        with self._lock:
            if name not in self.causes:
                self._add(name, cause)
                self._check()

    def _add(self, name: str, cause: str, images: int = 1) -> None:
        self.images += images
        self.causes[name] = cause = " ".join(cause.split())  # one line, whatever the decoder's message
        self._log(name, cause)
        if self.path is not None and name not in self.listed:
            self.listed.add(name)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(f"{_escaped(name)}\t{cause}\n")

    def _log(self, name: str, cause: str) -> None:
        if len(self) <= LOGGED:
            log.warning("bad image %s: %s", printable(name), cause)
        if len(self) == LOGGED:
            log.warning("further bad images are not logged%s", f", see {self.path}" if self.path else "")

    def _check(self) -> None:
        if self.images > self.limit * self.total:
            name, cause = next(reversed(self.causes.items()))
            where = f"{self.path} lists them" if self.path else f"the last one is {printable(name)}: {cause}"
            raise TooManyBadFiles(
                f"{self.images} of {self.total} images ({self.images / self.total:.2%}) cannot be read, more than the "
                f"{self.limit:.2%} tolerated; {where}; remove or repair them, or raise the limit (--max-bad)"
            )

    def _read_names(self) -> set[str]:
        if self.path is None or not self.path.exists():
            return set()
        with open(self.path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            return {_unescaped(line.split("\t", 1)[0]) for line in file}


_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_UNESCAPED = {escaped: meant for meant, escaped in _ESCAPES.items()}


def _escaped(name: str) -> str:
    return "".join(_ESCAPES.get(letter, letter) for letter in name)


def _unescaped(name: str) -> str:
    return re.sub(r"\\[\\tnr]", lambda escaped: _UNESCAPED[escaped[0]], name)


def printable(name: str) -> str:
    """A name on one line, printable anywhere: bytes that are not UTF-8 become \\xNN, control characters \\n, ..."""
    return name if name.isprintable() else "".join(map(_printable, name))


def _printable(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte, as os.fsdecode keeps it
        return f"\\x{ord(character) - 0xDC00:02x}"
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return character.encode("unicode_escape").decode()
    return character
