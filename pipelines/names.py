"""Names: many of them in two arrays (a million file names take their bytes, pickle fast and are cached as they are),
and how one is shown.
"""

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Names:
    """A read-only sequence of str. Names that are not UTF-8 survive, as in os.fsdecode."""

    blob: np.ndarray  # (bytes,) uint8: all names, one behind the other
    ends: np.ndarray  # (names,) int64: where each ends

    @classmethod
    def pack(cls, names: Iterable[str]) -> "Names":
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum(lengths))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        i = range(len(self.ends))[i]  # IndexError, negative positions
        start = self.ends[i - 1] if i else 0
        return self.blob[start : self.ends[i]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


def printable(name: str) -> str:
    """A name that can be written anywhere, on one line: what is no UTF-8 becomes \\xNN, a control character \\n, ..."""
    return name if name.isprintable() else "".join(map(_printable, name))


def _printable(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte, as os.fsdecode keeps it
        return f"\\x{ord(character) - 0xDC00:02x}"
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return character.encode("unicode_escape").decode()
    return character


def class_name(stored: str) -> str:
    """The name of a class as it is compared and shown: printable, and in one Unicode form (NFC), for macOS writes
    others than Linux does."""
    return unicodedata.normalize("NFC", printable(stored))
