"""What is passed between the parts of an index: the files that make up a data set, and what was read from them."""

import hashlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .names import Names

UNLABELLED = -100


class BadFile(NamedTuple):
    name: str
    cause: str


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

    def key(self) -> str:
        """Changes whenever a file was added, removed, renamed or rewritten, or a class came or went."""
        names = "\0".join([self.kind, *self.classes, "", *self.files])
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
    classes_are_named: bool  # False: the source knows numbers only, and `classes` is "0", "1", ...
    bad: tuple[BadFile, ...]
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
