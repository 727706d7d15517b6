"""What is passed between the parts of an index: the files that make up a data set, and what was read from them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .names import Names

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
