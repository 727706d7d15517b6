"""The index of a data set: names, labels and sizes of all images of a split as arrays, and the encoded bytes of each.

    index = open_index("imagenet", "train", cache_dir="runs/cache")
    index.classes[index.labels[7]], index.heights[7], index.encoded(7)

The index is built once, from file headers, and cached in `cache_dir` until the list of files changes. Files that cannot
be decoded are not in it, but listed in `index.bad`.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from fastdeit.pipelines.bad_files import BadFile, NoImages, printable

from . import folder, parquet, webdataset
from .labels import all_numbers, class_name
from .layout import list_classes, list_split
from .records import Listing, Records, load_records, save_records

log = logging.getLogger(__name__)

_KINDS: dict[str, tuple[Callable[[Listing], Records], type["Reader"]]] = {
    "folder": (folder.read_records, folder.FolderReader),
    "webdataset": (webdataset.read_records, webdataset.WebDatasetReader),
    "parquet": (parquet.read_records, parquet.ParquetReader),
}


class Reader(Protocol):
    """Reads encoded images. Thread-safe and picklable."""

    root: str

    def __init__(self, root: str, records: Records): ...
    def name(self, i: int) -> str: ...
    def path(self, i: int) -> str | None: ...
    def encoded(self, i: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Index:
    """n images in a fixed order; picklable.

    classes: names; a label is a position in it
    labels: (n,) int64, -100 for none
    heights, widths: (n,) int32, pixels as stored (no EXIF rotation)
    bad: files not in the index, because their headers show that they cannot be decoded
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    bad: tuple[BadFile, ...]
    records: Records
    reader: Reader
    split: str = ""  # the name it was found under, such as "test" where there is no "val"

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """The path of a plain file, shard:member in a tar, file:row in Parquet."""
        return self.reader.name(i)

    def path(self, i: int) -> str | None:
        """The absolute path of a plain file, None for an image in a shard."""
        return self.reader.path(i)

    def encoded(self, i: int) -> np.ndarray:
        """The encoded bytes, (bytes,) uint8; read-only for shards. Raises OSError if the file is gone."""
        return self.reader.encoded(i)

    @property
    def encoded_bytes(self) -> np.ndarray:
        """(n,) int64, the length of each encoded image when it was indexed."""
        return self.records.sizes

    def take(self, positions: np.ndarray) -> "Index":
        """An index of only these images, in this order, with the same classes; `bad` is empty."""
        positions = np.asarray(positions)
        records = self.records.take(positions)
        reader = type(self.reader)(self.reader.root, records)
        labels = self.labels[positions]
        return Index(self.classes, labels, records.heights, records.widths, (), records, reader, self.split)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of classes, names relative to the root, encoded sizes and labels; the same for a copy."""
        records = self.records
        digest = hashlib.sha256("\0".join([*self.classes, "", *records.shards]).encode("utf-8", "surrogateescape"))
        for array in (records.names.blob, records.names.ends, records.sizes, self.labels, records.shard_ids):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def open_index(
    path: str | os.PathLike,
    split: str = "train",
    *,
    classes: Sequence[str] | None = None,
    label_column: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Index:
    """Index one split of a labelled data set.

    path: a folder in one of these layouts; `val` is also found as validation, valid or test, in this order
        path/SPLIT/CLASS/**                             image folder; classes in sorted order, as torchvision
        path/SPLIT-*.tar or path/SPLIT/*.tar            WebDataset: members key.jpg and key.cls or key.json
        path/SPLIT-*.parquet or path/data/SPLIT-*.parquet or path/SPLIT/*.parquet    as Hugging Face datasets writes
    classes: the classes in the order of a model's outputs, such as those of training for the other splits; labels are
        positions in them. A class on one side only is an error, except that shards which declare no classes may lack
        some.
    label_column: label column of Parquet files, where its name does not tell
    cache_dir: where the index is cached; None builds it each time. With several processes, let one open it first.

    Raises ValueError, with what was found and what was expected, for a wrong path, no images, or other classes.
    """
    listing = replace(list_split(os.fspath(path), split), label_column=label_column)
    return _open(listing, f"the '{split}' split of {path}", classes, cache_dir)


def open_classes(
    path: str | os.PathLike, *, classes: Sequence[str] | None = None, cache_dir: str | os.PathLike | None = None
) -> Index:
    """Index a folder of classes without splits, path/CLASS/**. classes, cache_dir: as `open_index`."""
    return _open(list_classes(os.fspath(path)), f"the classes of {path}", classes, cache_dir)


def open_folder(path: str | os.PathLike, *, cache_dir: str | os.PathLike | None = None) -> Index:
    """All images under a folder, at any depth, without labels (-100). Raises ValueError if there are none."""
    if not os.path.isdir(path):
        raise ValueError(f"there is no folder {path}: check the path")
    return _open_unlabelled(folder.list_folder(os.fspath(path)), f"the folder {path}", cache_dir)


def open_files(paths: Sequence[str | os.PathLike], *, cache_dir: str | os.PathLike | None = None) -> Index:
    """The given files, and all images under the given folders, in this order, without labels (-100).

    Raises ValueError for a path that does not exist, NoImages if there are no images.
    """
    names = [os.fspath(path) for path in paths]
    what = f"the path {names[0]}" if len(names) == 1 else f"{len(names)} paths"
    return _open_unlabelled(folder.list_files(names), what, cache_dir)


def _open_unlabelled(listing: Listing, what: str, cache_dir: str | os.PathLike | None) -> Index:
    if not listing.files:
        raise NoImages(f"no images under {what} ({', '.join(sorted(folder.IMAGE_EXTENSIONS))})")
    return _open(listing, what, None, cache_dir)


def _open(listing: Listing, what: str, classes: Sequence[str] | None, cache_dir: str | os.PathLike | None) -> Index:
    read_records, make_reader = _KINDS[listing.kind]
    records = _cached(listing, what, cache_dir) if cache_dir is not None else read_records(listing)
    bad = tuple(one._replace(name=os.path.join(listing.root, one.name)) for one in records.bad)
    for note in (*listing.notes, *records.notes):
        log.warning("%s: %s", what, note)
    if not len(records.names):
        raise NoImages(_nothing_left(bad, what), bad)
    labels, classes = _labels_among(records, classes, what)
    if turned := int(records.rotated.sum()):
        log.warning("%s: the EXIF orientation of %d images is not applied, as in timm", what, turned)
    reader = make_reader(listing.root, records)
    return Index(classes, labels, records.heights, records.widths, bad, records, reader, listing.split)


def _nothing_left(bad: tuple[BadFile, ...], what: str) -> str:
    if not bad:
        return f"{what} holds no images"
    causes = "; ".join(f"{printable(one.name)}: {one.cause}" for one in bad[:3])
    return f"{what} has no image that can be read ({len(bad)} bad files: {causes})"


def _cached(listing: Listing, what: str, cache_dir: str | os.PathLike) -> Records:
    key = listing.key()
    place = hashlib.sha256(f"{listing.kind} {os.path.abspath(listing.root)} {what}".encode()).hexdigest()[:16]
    file = Path(cache_dir) / f"index-{place}.npz"
    records = load_records(file, key)
    if records is None:
        start = time.perf_counter()
        records = _KINDS[listing.kind][0](listing)
        save_records(file, key, records)
        log.info("indexed %s: %d images in %.1f s", what, len(records.names), time.perf_counter() - start)
    return records


def _labels_among(records: Records, wanted: Sequence[str] | None, what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels and classes, mapped to the `wanted` classes if given."""
    if wanted is None:
        return records.labels, records.classes
    wanted = tuple(wanted)
    place = {class_name(name): label for label, name in enumerate(wanted)}
    if not records.classes_are_declared and all_numbers(records.classes) and not place.keys() >= set(records.classes):
        if not all_numbers(wanted):
            place = {str(label): label for label in range(len(wanted))}  # numbers stand for the named classes
    missing = place.keys() - set(records.classes)
    if missing and not records.classes_are_declared:
        log.warning("%s: has no images of %s", what, _some(missing))
        missing = set()
    _refuse_other_classes(set(records.classes) - place.keys(), missing, what)
    translation = np.array([place[name] for name in records.classes], np.int64)
    return translation[records.labels], wanted


def _refuse_other_classes(unknown: set[str], missing: set[str], what: str) -> None:
    if not unknown and not missing:
        return
    parts = []
    if missing:
        parts.append(f"lacks {_some(missing)}")
    if unknown:
        parts.append(f"has {_some(unknown)}, unknown to training")
    raise ValueError(
        f"{what} does not have the classes of training: it {' and '.join(parts)}; give it the same classes "
        "(an empty class folder is enough)"
    )


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return f"{shown} and {len(names) - 5} more ({len(names)} classes)" if len(names) > 5 else shown
