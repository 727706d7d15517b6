"""WebDataset: tar shards whose members key.jpg and key.cls (or key.json) make up a sample.

Only the tar headers, the labels and the first bytes of each image are read for the index; an image is then a slice of
its memory-mapped shard, so random access costs what it costs in a file of its own.

Labels: key.cls holds a number or a class name; without it, key.json holds {"label": number or name}. Numbers are
named by the lines of classes.txt (or classnames.txt) in the data set's folder; without such a file they stay numbers.
"""

import json
import mmap
import os
import resource
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .folder import EXTENSIONS, THREADS
from .inspection import BadHeader, Inspected, columns, inspect
from .labels import number_labels
from .names import Names
from .records import BadFile, Listing, Records
from .tar_headers import BadTar, Member, members


class Sample(NamedTuple):
    """What one shard says of one image; header is None where `cause` says why it is bad."""

    image: Member
    label: int | str | None
    header: Inspected | None
    cause: str = ""


def read_records(listing: Listing) -> Records:
    """Read the headers of every shard."""
    with ThreadPoolExecutor(THREADS) as pool:
        shards = list(pool.map(lambda file: _read_shard(os.path.join(listing.root, file)), listing.files))
    bad, good, shard_ids = [], [], []
    for shard_id, (file, (samples, broken)) in enumerate(zip(listing.files, shards)):
        if broken:
            bad.append(BadFile(file, broken))
        bad += [BadFile(f"{file}:{s.image.name}", s.cause) for s in samples if s.cause]
        good += [s for s in samples if not s.cause]
        shard_ids += [shard_id] * sum(not s.cause for s in samples)
    labels, classes, named = number_labels([s.label for s in good], listing.classes)
    return Records(
        names=Names.pack(s.image.name for s in good),
        sizes=np.array([s.image.size for s in good], np.int64),
        labels=labels,
        **columns([s.header for s in good]),
        classes=classes,
        classes_are_named=named,
        bad=tuple(bad),
        shards=tuple(listing.files),
        shard_ids=np.array(shard_ids, np.int32),
        positions=np.array([s.image.offset for s in good], np.int64),
    )


def _read_shard(path: str) -> tuple[list[Sample], str]:
    """The samples, and why the shard could not be read to its end ("" if it could)."""
    found: list[Member] = []
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        return [], f"cannot be opened ({error.strerror})"

    def read(offset: int, count: int) -> bytes:
        return os.pread(descriptor, count, offset)

    try:
        broken = _collect(members(read, os.fstat(descriptor).st_size), found)
        return [_sample(read, parts) for parts in _by_key(found) if _image_of(parts)], broken
    except OSError as error:
        return [], f"cannot be read ({error.strerror})"
    finally:
        os.close(descriptor)


def _collect(source: Iterable[Member], found: list[Member]) -> str:
    try:
        found.extend(source)
    except BadTar as cause:
        return f"{cause}; the members before it are used"
    return ""


def _by_key(found: list[Member]) -> list[dict[str, Member]]:
    """Group members by name up to the first dot of its last part: a/b.jpg and a/b.cls are a sample."""
    samples: dict[str, dict[str, Member]] = {}
    for member in found:
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        samples.setdefault(folder + slash + stem, {}).setdefault("." + extension.lower(), member)
    return list(samples.values())


def _image_of(parts: dict[str, Member]) -> Member | None:
    return next((member for extension, member in parts.items() if extension in EXTENSIONS), None)


def _sample(read: Callable[[int, int], bytes], parts: dict[str, Member]) -> Sample:
    image = _image_of(parts)
    label = _label(read, parts)
    if label is None:
        return Sample(image, None, None, "no label: neither .cls nor .json with 'label'")

    def read_image(offset: int, count: int) -> bytes:
        rest = image.size - offset
        return read(image.offset + offset, rest if count < 0 else max(0, min(count, rest)))

    try:
        return Sample(image, label, inspect(read_image))
    except BadHeader as cause:
        return Sample(image, label, None, str(cause))


def _label(read: Callable[[int, int], bytes], parts: dict[str, Member]) -> int | str | None:
    if member := parts.get(".cls"):
        text = read(member.offset, member.size).decode("utf-8", "replace").strip()
        return int(text) if text.lstrip("-").isdecimal() else text or None
    if member := parts.get(".json"):
        try:
            label = json.loads(read(member.offset, member.size)).get("label")
        except (ValueError, AttributeError):
            return None
        return label if isinstance(label, (int, str)) else None
    return None


class WebDatasetReader:
    """Encoded images as slices of memory-mapped shards, which must not be rewritten while they are in use."""

    def __init__(self, root: str, records: Records):
        self.root = root
        self.absolute_root = os.path.abspath(root)
        self.records = records
        self._keep_maps()

    def _keep_maps(self) -> None:
        # A map holds a file open: half of what the process may open, the latest used ones. An image keeps its map
        # alive, so one that is dropped here goes when its last image does.
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._map = lru_cache(None if limit == resource.RLIM_INFINITY else max(1, limit // 2))(self._open)

    def __getstate__(self) -> dict:
        return {name: self.__dict__[name] for name in ("root", "absolute_root", "records")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._keep_maps()

    def name(self, i: int) -> str:
        records = self.records
        return f"{os.path.join(self.root, records.shards[records.shard_ids[i]])}:{records.names[i]}"

    def path(self, i: int) -> None:
        return None

    def encoded(self, i: int) -> np.ndarray:
        records = self.records
        shard = self._map(int(records.shard_ids[i]))
        offset, size = int(records.positions[i]), int(records.sizes[i])
        if offset + size > len(shard):
            raise OSError(f"{self.name(i)}: the shard was cut after it was indexed")
        return np.frombuffer(shard, np.uint8, size, offset)

    def _open(self, shard_id: int) -> mmap.mmap:
        with open(os.path.join(self.absolute_root, self.records.shards[shard_id]), "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
