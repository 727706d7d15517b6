"""WebDataset: tar shards whose members key.jpg and key.cls (or key.json) make up a sample (webdataset_samples.py).

Only the tar headers, the labels and the first bytes of each image are read for the index; an image is then a slice of
its memory-mapped shard, so random access costs what it costs in a file of its own.

Labels: key.cls holds a number or a class name; without it, key.json holds {"label": number or name}. Numbers are
named by the lines of classes.txt (or classnames.txt) in the data set's folder; without such a file they stay numbers.
"""

import json
import mmap
import os
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .folder import THREADS, open_file
from .inspection import BadHeader, Inspected, columns, inspect
from .records import BadFile, Label, Listing, Lost, Names, Records, bad_shards, is_number, label_of, number_labels
from .tar_members import Damage, Member, read_members
from .webdataset_samples import Found, pair

Read = Callable[[int, int], bytes]  # (offset, count) of a shard


class Sample(NamedTuple):
    """What one shard says of one image; header is None where `cause` says why it is bad."""

    image: Member
    label: Label | None
    header: Inspected | None
    cause: str = ""


class Shard(NamedTuple):
    samples: list[Sample]
    damages: list[Damage]
    further: int = 0  # images that belong to a sample with another image


def read_records(listing: Listing) -> Records:
    """Read the headers of every shard."""
    with ThreadPoolExecutor(THREADS) as pool:
        shards = list(pool.map(lambda file: _read_shard(os.path.join(listing.root, file)), listing.files))
    bad, good, shard_ids = [], [], []
    for shard_id, (file, shard) in enumerate(zip(listing.files, shards)):
        bad += [BadFile(f"{file}:{s.image.name}", s.cause) for s in shard.samples if s.cause]
        good += [s for s in shard.samples if not s.cause]
        shard_ids += [shard_id] * sum(not s.cause for s in shard.samples)
    lost = [Lost(i, one.cause, bytes=one.lost_bytes) for i, shard in enumerate(shards) for one in shard.damages]
    labels, classes, declared = number_labels([s.label for s in good], listing.classes)
    further = sum(shard.further for shard in shards)
    return Records(
        names=Names.pack(s.image.name for s in good),
        sizes=np.array([s.image.size for s in good], np.int64),
        labels=labels,
        **columns([s.header for s in good]),
        classes=classes,
        classes_are_declared=declared,
        bad=bad_shards(listing.files, lost, np.array([len(s.samples) for s in shards]), listing.sizes) + tuple(bad),
        notes=(f"{further} further images of samples, such as KEY.mask.png beside KEY.jpg, are not used",)
        * (further > 0),
        shards=tuple(listing.files),
        shard_ids=np.array(shard_ids, np.int32),
        positions=np.array([s.image.offset for s in good], np.int64),
    )


def _read_shard(path: str) -> Shard:
    try:
        descriptor = open_file(path)
    except OSError as error:
        return Shard([], [Damage(f"cannot be opened ({error.strerror})", None)])

    def read(offset: int, count: int) -> bytes:
        return os.pread(descriptor, count, offset)

    with open(descriptor, "rb") as file:
        try:
            members, damages = read_members(file)
            found, further = pair(members)
            return Shard([_sample(read, one) for one in found if not _is_other(read, one)], damages, further)
        except OSError as error:
            return Shard([], [Damage(f"cannot be read ({error.strerror})", None)])


def _is_other(read: Read, found: Found) -> bool:
    """Whether it is no image and no label of one, but a .json with something else."""
    return found.member is found.label and found.label.name.endswith(".json") and _label(read, found.label) is None


def _sample(read: Read, found: Found) -> Sample:
    image = found.member
    if cause := found.cause or image.cause:
        return Sample(image, None, None, cause)
    if found.label.cause:
        return Sample(image, None, None, f"its label {found.label.name}: {found.label.cause}")
    label = _label(read, found.label)
    if label is None:
        return Sample(image, None, None, "no label: neither .cls nor .json with 'label'")

    def read_image(offset: int, count: int) -> bytes:
        rest = image.size - offset
        return read(image.offset + offset, rest if count < 0 else max(0, min(count, rest)))

    try:
        return Sample(image, label, inspect(read_image))
    except BadHeader as cause:
        return Sample(image, label, None, str(cause))


def _label(read: Read, member: Member) -> Label | None:
    contents = read(member.offset, member.size)
    if not member.name.lower().endswith(".json"):
        label = label_of(contents.removeprefix(b"\xef\xbb\xbf"))
        return int(label) if label is not None and is_number(label) else label
    try:
        return label_of(json.loads(contents).get("label"))
    except (ValueError, AttributeError, RecursionError):
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
