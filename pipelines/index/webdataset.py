"""WebDataset: tar shards whose members key.jpg and key.cls (or key.json) make up a sample.

Only the tar headers, the labels and the first bytes of each image are read for the index. An image is then a slice of
its memory-mapped shard, so random access costs the same as with plain files.

Labels: key.cls holds a number or a class name; without it, key.json holds {"label": number or name}. Numbers are
named by the lines of classes.txt (or classnames.txt) in the data set's folder; without such a file they stay numbers.

Which members make up a sample:

    7.jpg 7.cls             a sample; the label may also be in 7.json
    v1.5.jpg v1.5.cls       a sample: keys may contain dots, as file names do
    7.left.jpg 7.cls        a sample: webdataset ends a key at its first dot
    7.jpg 7.cls 7.mask.png  one sample; the mask is a further image of it, counted and ignored
    7.jpg 7.cls 7.jpg 7.cls the key occurs twice: two samples
    7.jpg 7.png 7.cls       either may be the image: the first is, the other is listed as bad
    7.cls                   no image: listed as bad
"""

import json
import mmap
import os
import posixpath
import resource
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fastdeit.pipelines.bad_files import BadFile

from .folder import IMAGE_EXTENSIONS, THREADS, is_ignored, open_file
from .inspection import BadHeader, Inspected, columns, inspect
from .labels import Label, is_number, label_of, number_labels
from .records import Listing, Lost, Names, Records, bad_shards
from .tar_members import Damage, Member, read_members

Read = Callable[[int, int], bytes]  # (offset, count) of a shard

_LABELS = (".cls", ".json")  # in this order
Parts = dict[str, Member]  # members of one name by their endings: ".jpg", ".cls"


class Candidate(NamedTuple):
    """An image, or the label of one that is missing; `cause` says why there is no sample."""

    member: Member
    label: Member | None
    cause: str = ""


class Sample(NamedTuple):
    """An image with its label and header; header is None where `cause` says why it is bad."""

    image: Member
    label: Label | None
    header: Inspected | None
    cause: str = ""


class Shard(NamedTuple):
    samples: list[Sample]
    damages: list[Damage]
    further: int = 0  # images of samples that have another image


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
            candidates, further = pair(members)
            samples = [_sample(read, one) for one in candidates if not _is_other_json(read, one)]
            return Shard(samples, damages, further)
        except OSError as error:
            return Shard([], [Damage(f"cannot be read ({error.strerror})", None)])


def _is_other_json(read: Read, candidate: Candidate) -> bool:
    """Whether it is a .json that is not the label of an image."""
    return (
        candidate.member is candidate.label
        and candidate.label.name.endswith(".json")
        and _read_label(read, candidate.label) is None
    )


def _sample(read: Read, candidate: Candidate) -> Sample:
    image = candidate.member
    if cause := candidate.cause or image.cause:
        return Sample(image, None, None, cause)
    if candidate.label.cause:
        return Sample(image, None, None, f"its label {candidate.label.name}: {candidate.label.cause}")
    label = _read_label(read, candidate.label)
    if label is None:
        return Sample(image, None, None, "no label: neither .cls nor .json with 'label'")

    def read_image(offset: int, count: int) -> bytes:
        rest = image.size - offset
        return read(image.offset + offset, rest if count < 0 else max(0, min(count, rest)))

    try:
        return Sample(image, label, inspect(read_image))
    except BadHeader as cause:
        return Sample(image, label, None, str(cause))


def _read_label(read: Read, member: Member) -> Label | None:
    contents = read(member.offset, member.size)
    if not member.name.lower().endswith(".json"):
        label = label_of(contents.removeprefix(b"\xef\xbb\xbf"))
        return int(label) if label is not None and is_number(label) else label
    try:
        return label_of(json.loads(contents).get("label"))
    except (ValueError, AttributeError, RecursionError):
        return None


class WebDatasetReader:
    """Reads images as slices of memory-mapped shards, which must not be rewritten while they are in use."""

    def __init__(self, root: str, records: Records):
        self.root = root
        self.absolute_root = os.path.abspath(root)
        self.records = records
        self._keep_maps()

    def _keep_maps(self) -> None:
        # A map keeps a file open: at most half of the files the process may open stay mapped, the least recently used
        # are dropped first. An image keeps its map alive, so a dropped one is closed with its last image.
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
            raise OSError(f"{self.name(i)}: the shard was truncated after it was indexed")
        return np.frombuffer(shard, np.uint8, size, offset)

    def _open(self, shard_id: int) -> mmap.mmap:
        with open(os.path.join(self.absolute_root, self.records.shards[shard_id]), "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


# --- which members make up a sample


def pair(members: Iterable[Member]) -> tuple[list[Candidate], int]:
    """(images with their labels, the number of ignored further images)"""
    named = _by_name(members)
    further = {_field(name, named) for name, groups in named.items() if _is_field_of_an_image(name, groups, named)}
    found: list[Candidate] = []
    ignored, taken = 0, set()  # taken: labels used by an image with a longer name
    for name, groups in named.items():
        for number, parts in enumerate(groups):
            if not (images := _images(parts)):
                continue
            first, *others = images
            label = _label_member(parts)
            key = None if label else _key(name, named)
            if key is not None:
                place = (key, min(number, len(named[key]) - 1))
                if _field(name, named) in further or _images(named[key][place[1]]):
                    ignored += len(images)
                    continue
                label = None if place in taken else _label_member(named[key][place[1]])
                again = place in taken
                taken.add(place)
            else:
                again = label is None and any(map(_images, groups[:number]))
            cause = _second(key or name) if again else "no label: neither .cls nor .json with 'label'"
            found.append(Candidate(first, label, "" if label else cause))
            found += [Candidate(other, None, _second(name)) for other in others]
    found += [Candidate(label, label, "no image of this name") for label in _without_image(named, taken)]
    return found, ignored


def _by_name(members: Iterable[Member]) -> dict[str, list[Parts]]:
    """Members by their name without the ending; a new group begins where a sample is complete, or repeats."""
    named: dict[str, list[Parts]] = {}
    for member in members:
        path = posixpath.normpath(member.name)
        if any(is_ignored(part) for part in path.split("/") if part != ".."):
            continue
        name, ending = posixpath.splitext(path)
        groups = named.setdefault(name, [{}])
        ending = ending.lower()
        complete = ending in IMAGE_EXTENSIONS and _label_member(groups[-1]) and _images(groups[-1])
        if ending in groups[-1] or complete:
            groups.append({})
        groups[-1][ending] = member
    return named


def _images(parts: Parts) -> list[Member]:
    return [member for ending, member in parts.items() if ending in IMAGE_EXTENSIONS]


def _label_member(parts: Parts) -> Member | None:
    return next((parts[ending] for ending in _LABELS if ending in parts), None)


def _key(name: str, named: dict[str, list[Parts]]) -> str | None:
    """The longest prefix of a name, up to one of its dots, that is the name of an image or a label."""
    folder, slash, base = name.rpartition("/")
    while "." in base:
        base = base.rpartition(".")[0]
        if any(_images(parts) or _label_member(parts) for parts in named.get(folder + slash + base, ())):
            return folder + slash + base
    return None


def _field(name: str, named: dict[str, list[Parts]]) -> str:
    """.mask, of 7.mask"""
    return name.removeprefix(_key(name, named) or name)


def _is_field_of_an_image(name: str, groups: list[Parts], named: dict[str, list[Parts]]) -> bool:
    if not _images(groups[0]) or _label_member(groups[0]):
        return False
    key = _key(name, named)
    return key is not None and any(map(_images, named[key]))


def _second(key: str) -> str:
    return f"a second image under the key {posixpath.basename(key)}, which may have only one"


def _without_image(named: dict[str, list[Parts]], taken: set[tuple[str, int]]) -> Iterator[Member]:
    for name, groups in named.items():
        for number, parts in enumerate(groups):
            if not _images(parts) and (name, number) not in taken and (label := _label_member(parts)):
                yield label
