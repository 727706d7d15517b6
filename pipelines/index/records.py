"""Names: many of them in two arrays (a million file names take their bytes, pickle fast and are cached as they are),
and how one is shown.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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


UNLABELLED = -100


class BadFile(NamedTuple):
    name: str
    cause: str
    images: int = 1  # that are lost with it; estimated for a shard


class Lost(NamedTuple):
    """What of a shard cannot be read."""

    shard_id: int
    cause: str
    images: int | None = None  # as far as it is known
    bytes: int | None = None  # that were passed over, if that is known


def bad_shards(files: Sequence[str], lost: Sequence[Lost], found: np.ndarray, sizes: np.ndarray) -> tuple[BadFile, ...]:
    """One bad file a shard, with the number of images it stands for: known, or estimated as well as the others allow.

    found: (shards,) images that can be read in each. sizes: (shards,) bytes of each
    """
    damaged = np.array(sorted({one.shard_id for one in lost}), np.int64)
    whole = np.delete(found, damaged)
    usual = int(np.median(whole)) if len(whole) else 0
    readable = sizes.sum() - sum(one.bytes or 0 for one in lost)
    bytes_per_image = readable / found.sum() if found.sum() else np.inf
    bad = []
    for shard_id in damaged.tolist():
        here = [one for one in lost if one.shard_id == shard_id]
        images = sum(
            one.images if one.images is not None
            else max(1, usual - int(found[shard_id])) if one.bytes is None
            else max(1, round(one.bytes / bytes_per_image))
            for one in here
        )  # fmt: skip
        cause = here[0].cause + (f" (and {len(here) - 1} more)" if len(here) > 1 else "")
        counted = f"; counted as {images} images" if images > 1 else ""
        bad.append(BadFile(files[shard_id], cause + counted, images))
    return tuple(bad)


@dataclass(frozen=True)
class Listing:
    """The files behind one split, seen with stat only: images of a folder, or shards of tar or Parquet."""

    kind: str  # "folder", "webdataset" or "parquet"
    root: str  # what the file names are relative to; "" for files given one by one
    files: list[str]
    sizes: np.ndarray  # (files,) int64, bytes
    mtimes: np.ndarray  # (files,) int64, nanoseconds
    classes: tuple[str, ...] = ()  # folders: the class folders; shards: names given beside them, if any
    labels: np.ndarray | None = None  # (files,) int64, folders only
    label_column: str | None = None  # of Parquet, if one is asked for
    split: str = ""  # the name under which it was found
    notes: tuple[str, ...] = ()  # what was decided when the files were listed, in sentences

    def key(self) -> str:
        """Changes whenever a file was added, removed, renamed or rewritten, or a class came or went."""
        names = "\0".join([self.kind, self.label_column or "", *self.classes, "", *self.files])
        digest = hashlib.sha256(names.encode("utf-8", "surrogateescape"))
        digest.update(self.sizes.tobytes())
        digest.update(self.mtimes.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Records:
    """One row for each good image of a split, in its fixed order."""

    names: Names  # the file, relative to the root; or the member or row inside the shard
    sizes: np.ndarray  # (n,) int64, bytes of the encoded image
    labels: np.ndarray  # (n,) int64, UNLABELLED where there is none
    heights: np.ndarray  # (n,) int32
    widths: np.ndarray  # (n,) int32
    rotated: np.ndarray  # (n,) bool: EXIF asks for a turn or a reflection, which is not applied
    classes: tuple[str, ...]
    classes_are_declared: bool  # False: `classes` are the labels that occur, and in another split others may
    bad: tuple[BadFile, ...]
    notes: tuple[str, ...] = ()  # what was decided or passed over, to be said each time the split is opened
    shards: tuple[str, ...] = ()  # relative to the root; none for plain files
    shard_ids: np.ndarray | None = None  # (n,) int32
    positions: np.ndarray | None = None  # (n,) int64: byte offset in a tar, row in a Parquet file

    def take(self, rows: np.ndarray) -> "Records":
        """These rows alone; the bad files are not theirs."""

        def taken(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[rows]

        return replace(
            self,
            names=Names.pack(self.names[i] for i in rows),
            sizes=self.sizes[rows],
            labels=self.labels[rows],
            heights=self.heights[rows],
            widths=self.widths[rows],
            rotated=self.rotated[rows],
            bad=(),
            shard_ids=taken(self.shard_ids),
            positions=taken(self.positions),
        )


Label = int | str


_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)")  # as str() writes it: 007 is a name


def label_of(stored: Any) -> Label | None:
    """A stored value as a label, None if it is none: numbers without fraction, truth values, names, digits."""
    if isinstance(stored, bool):
        return str(stored)
    if isinstance(stored, bytes):
        stored = stored.decode("utf-8", "surrogateescape")
    if isinstance(stored, str):
        return class_name(stored.strip()) or None
    if isinstance(stored, float):
        return int(stored) if stored.is_integer() else None
    return stored if isinstance(stored, int) else None


def number_labels(stored: Sequence[Label], declared: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...], bool]:
    """(labels (n,) int64, classes, whether these were declared: else they are those that occur).

    stored: what label_of gives: all numbers (or digits), or all names. declared: names in the order of the labels, ()
    if nobody wrote them down; then the classes are the values that occur, names sorted as strings, numbers as numbers.
    Raises ValueError for labels outside the declared ones, for negative numbers and for a mixture of both kinds.
    """
    if all(isinstance(label, int) or is_number(label) for label in stored) and set(stored).isdisjoint(declared):
        return _number_numbers([int(label) for label in stored], declared)
    if numbers := [label for label in stored if isinstance(label, int)]:
        raise ValueError(f"the shards mix labels that are numbers ({numbers[0]}) and names: write all in one way")
    classes = declared or tuple(sorted(set(stored)))
    place = {name: label for label, name in enumerate(classes)}
    if unknown := set(stored) - set(place):
        raise ValueError(f"the shards hold the class {min(unknown)}, which is not among the declared class names")
    return np.array([place[name] for name in stored], np.int64), classes, bool(declared)


def is_number(name: str) -> bool:
    return _NUMBER.fullmatch(name) is not None


def all_numbers(names: Iterable[str]) -> bool:
    return all(map(is_number, names))


def natural_order(classes: Sequence[str]) -> list[str]:
    """Numbers within names compared as numbers, as timm sorts class folders: 2 before 10."""
    parts = {name: re.split(r"(\d+)", name.lower()) for name in classes}
    return sorted(classes, key=lambda name: [int(part) if part.isdecimal() else part for part in parts[name]])


def _number_numbers(stored: list[int], declared: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...], bool]:
    if stored and max(stored) >= 2**63:
        raise ValueError(f"the shards hold the label {max(stored)}: no number of a class has so many digits")
    labels = np.array(stored, np.int64)
    values, places = np.unique(labels, return_inverse=True)
    if len(values) and values[0] < 0:
        raise ValueError(
            f"the shards hold the negative label {values[0]}: labels count from 0 (-1 often means that there is none, "
            "as in a test split)"
        )
    if not declared:
        return places.astype(np.int64), tuple(map(str, values.tolist())), False
    if len(values) and values[-1] >= len(declared):
        raise ValueError(f"the shards hold the label {values[-1]}, but only {len(declared)} class names are declared")
    return labels, declared, True
