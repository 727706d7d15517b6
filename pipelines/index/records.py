"""The arrays behind an index: the files of a split (Listing), one row for each good image (Records), and their cache.

n images in a fixed order; names are packed into two arrays (Names), so that a million of them pickle and load fast.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastdeit.pipelines.bad_files import BadFile


@dataclass(frozen=True)
class Listing:
    """The files of one split, from stat only: images of a folder, or tar or Parquet shards."""

    kind: str  # "folder", "webdataset" or "parquet"
    root: str  # of the file names; "" for files given one by one
    files: list[str]
    sizes: np.ndarray  # (files,) int64, bytes
    mtimes: np.ndarray  # (files,) int64, nanoseconds
    classes: tuple[str, ...] = ()  # class folders, or the names in the classes.txt of shards
    labels: np.ndarray | None = None  # (files,) int64, folders only
    label_column: str | None = None  # of Parquet files, if given
    split: str = ""  # the name it was found under
    notes: tuple[str, ...] = ()  # decisions to log each time the split is opened

    def key(self) -> str:
        """Changes when a file is added, removed, renamed or rewritten, or a class is added or removed."""
        names = "\0".join([self.kind, self.label_column or "", *self.classes, "", *self.files])
        digest = hashlib.sha256(names.encode("utf-8", "surrogateescape"))
        digest.update(self.sizes.tobytes())
        digest.update(self.mtimes.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Names:
    """A read-only sequence of str. Names that are not UTF-8 survive, as in os.fsdecode."""

    blob: np.ndarray  # (bytes,) uint8: all names, concatenated
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


@dataclass(frozen=True)
class Records:
    """One row for each good image of a split, in a fixed order."""

    names: Names  # the file, relative to the root; or the member or row inside the shard
    sizes: np.ndarray  # (n,) int64, bytes of the encoded image
    labels: np.ndarray  # (n,) int64, UNLABELLED (-100) for none
    heights: np.ndarray  # (n,) int32
    widths: np.ndarray  # (n,) int32
    rotated: np.ndarray  # (n,) bool: has an EXIF orientation, which is not applied
    classes: tuple[str, ...]
    classes_are_declared: bool  # False: `classes` are the labels that occur; other splits may have others
    bad: tuple[BadFile, ...]
    notes: tuple[str, ...] = ()  # decisions to log each time the split is opened
    shards: tuple[str, ...] = ()  # relative to the root; none for plain files
    shard_ids: np.ndarray | None = None  # (n,) int32
    positions: np.ndarray | None = None  # (n,) int64: byte offset in a tar, row in a Parquet file

    def take(self, rows: np.ndarray) -> "Records":
        """Only these rows, without bad files."""

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


# --- on disk

FORMAT = 3  # raise it when the meaning of a stored field changes
_ARRAYS = ("sizes", "labels", "heights", "widths", "rotated", "shard_ids", "positions")


def load_records(file: Path, key: str) -> Records | None:
    """The cached records; None if there are none, if they are of other files, or if the cache file is damaged."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            about = json.loads(stored["about"].tobytes())
            if about["format"] != FORMAT or about["key"] != key:
                return None
            arrays = {name: stored[name] for name in _ARRAYS if name in stored.files}
            names = Names(stored["names"], stored["name_ends"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Records(
        names=names,
        classes=tuple(about["classes"]),
        classes_are_declared=about["classes_are_declared"],
        bad=tuple(BadFile(*bad) for bad in about["bad"]),
        notes=tuple(about["notes"]),
        shards=tuple(about["shards"]),
        **arrays,
    )


def save_records(file: Path, key: str, records: Records) -> None:
    """Written to a temporary file and renamed, so that a reader never sees a partial file."""
    about = {
        "format": FORMAT,
        "key": key,
        "classes": records.classes,
        "classes_are_declared": records.classes_are_declared,
        "bad": records.bad,
        "notes": records.notes,
        "shards": records.shards,
    }
    arrays = {name: getattr(records, name) for name in _ARRAYS if getattr(records, name) is not None}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as stream:
        np.savez(
            stream,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            names=records.names.blob,
            name_ends=records.names.ends,
            **arrays,
        )
    os.replace(temporary, file)


# --- damaged shards


class Lost(NamedTuple):
    """A part of a shard that cannot be read."""

    shard_id: int
    cause: str
    images: int | None = None  # None if not known
    bytes: int | None = None  # skipped; None if not known


def bad_shards(files: Sequence[str], lost: Sequence[Lost], found: np.ndarray, sizes: np.ndarray) -> tuple[BadFile, ...]:
    """One BadFile for each damaged shard, with the number of images lost: known, or estimated from the other shards.

    found: (shards,) images that can be read in each. sizes: (shards,) bytes of each
    """
    damaged = np.array(sorted({one.shard_id for one in lost}), np.int64)
    intact = np.delete(found, damaged)
    usual = int(np.median(intact)) if len(intact) else 0
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
