"""Parquet files of encoded images, as Hugging Face datasets writes them: image struct<bytes, path>, integer label.

The label column is the one that --label-column names, else one with a usual name, else the only one with class names (a
ClassLabel feature): other numbers may be anything, such as a width or an id.

Parquet is compressed by row groups (100 images in those of the Hub), and a full group is read to get one image. Groups
are kept in memory up to CACHE_BYTES, so a small data set is fully resident. A larger one in random order reads about a
row group per image; `python -m fastdeit.pipelines.prepare` turns it into shards once.
"""

import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fastdeit.pipelines.bad_files import BadFile

from .folder import open_file
from .inspection import BadHeader, Inspected, columns, inspect_bytes
from .labels import Label, class_name, label_of, number_labels
from .records import Listing, Lost, Names, Records, bad_shards

log = logging.getLogger(__name__)

CACHE_BYTES = 1 << 30
BATCH_BYTES = 1 << 26  # read at a time: Arrow cannot hold more than 2 GiB of a column in one array
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target", "category")


class Row(NamedTuple):
    """A good image."""

    label: Label
    encoded_bytes: int
    header: Inspected
    shard_id: int
    position: int  # row in the file


class Read(NamedTuple):
    """What was read of a file, besides its rows."""

    rows: int  # good and bad
    label: str  # the column
    declared: tuple[str, ...]  # the names of a ClassLabel feature


def read_records(listing: Listing) -> Records:
    """Read the header of every image; with Parquet this reads the full images."""
    rows: list[Row] = []
    bad: list[BadFile] = []
    lost: list[Lost] = []
    read = [_read_file(listing, shard_id, rows, bad, lost) for shard_id in range(len(listing.files))]
    _advise(sum(row.encoded_bytes for row in rows), listing.root)
    stored, declared = _named(rows, [one.declared for one in read], listing)
    labels, classes, declared = number_labels(stored, declared)
    found = np.array([one.rows for one in read])
    columns_used = sorted({one.label for one in read if one.label})
    return Records(
        names=Names.pack(str(row.position) for row in rows),
        sizes=np.array([row.encoded_bytes for row in rows], np.int64),
        labels=labels,
        **columns([row.header for row in rows]),
        classes=classes,
        classes_are_declared=declared,
        bad=bad_shards(listing.files, lost, found, listing.sizes) + tuple(bad),
        notes=(f"the labels are in the column {' and '.join(columns_used)}",) if columns_used else (),
        shards=tuple(listing.files),
        shard_ids=np.array([row.shard_id for row in rows], np.int32),
        positions=np.array([row.position for row in rows], np.int64),
    )


def _read_file(listing: Listing, shard_id: int, rows: list[Row], bad: list[BadFile], lost: list[Lost]) -> Read:
    """Append to `rows`, `bad` and `lost`."""
    import pyarrow as pa

    file, seen, label, declared = listing.files[shard_id], 0, "", ()
    try:
        with _open_parquet(os.path.join(listing.root, file)) as parquet:
            image, label = _columns(parquet.schema_arrow, file, listing.label_column)
            declared = _declared_classes(parquet.schema_arrow, label)
            start = 0
            for group in range(parquet.num_row_groups):
                position, end = start, start + parquet.metadata.row_group(group).num_rows
                try:
                    for encoded, stored in _images_and_labels(parquet, group, image, label):
                        its_label = label_of(stored)
                        header, cause = _inspect_or_cause(encoded, its_label)
                        if cause:
                            bad.append(BadFile(f"{file}:{position}", cause))
                        else:
                            rows.append(Row(its_label, len(encoded), header, shard_id, position))
                        position += 1
                except (OSError, pa.ArrowException) as error:
                    lost.append(Lost(shard_id, f"row group {group} cannot be read ({error})", images=end - position))
                seen, start = seen + position - start, end
    except (OSError, pa.ArrowException) as error:
        lost.append(Lost(shard_id, f"cannot be read as Parquet ({error})"))
    return Read(seen, label, declared)


def _open_parquet(path: str) -> Any:
    import pyarrow.parquet as pq

    os.close(open_file(path))  # raises for a pipe, on which pyarrow would block
    return pq.ParquetFile(path, memory_map=True)


def _named(rows: list[Row], declared: list[tuple[str, ...]], listing: Listing) -> tuple[list[Label], tuple[str, ...]]:
    """(label of each row, a name where its file declares names; all declared names in order of appearance)"""
    if not any(declared):
        return [row.label for row in rows], listing.classes
    names = tuple(dict.fromkeys(name for some in declared for name in some))
    stored = []
    for row in rows:
        of_file = declared[row.shard_id]
        if not of_file and isinstance(row.label, int):
            with_names = listing.files[next(i for i, some in enumerate(declared) if some)]
            raise ValueError(
                f"{listing.files[row.shard_id]} has numbers as labels and no class names, {with_names} has names: "
                "write all of them in one way"
            )
        if isinstance(row.label, int) and not 0 <= row.label < len(of_file):
            raise ValueError(
                f"{listing.files[row.shard_id]}: the label {row.label} is not among the {len(of_file)} classes that "
                "the file declares (-1 often means no label, as in a test split)"
            )
        stored.append(of_file[row.label] if isinstance(row.label, int) else row.label)
    return stored, listing.classes or names


def _advise(total: int, root: str) -> None:
    if total > CACHE_BYTES:
        log.warning(
            "%s: reading %.0f GiB of Parquet in random order is slow: turn it into shards once with "
            "`python -m fastdeit.pipelines.prepare %s OUT`",
            root,
            total / 2**30,
            root,
        )


def _columns(schema: Any, file: str, asked: str | None) -> tuple[str, str]:
    """The names of the image and the label column. Raises ValueError if either is ambiguous."""
    image = _image_column(schema)
    if image is None:
        raise ValueError(
            f"{file}: it is not clear which column has the encoded images (columns: {', '.join(schema.names)}); "
            f"name it '{_IMAGE_NAMES[0]}'"
        )
    fitting = [field.name for field in schema if _may_be_label(field.type)]
    with_names = [name for name in fitting if _declared_classes(schema, name)]
    usual = [name for name in _LABEL_NAMES if name in fitting]
    label = asked or (usual[0] if usual else with_names[0] if len(with_names) == 1 else None)
    if label in fitting:
        return image, label
    found = f"there is no label column '{asked}'" if asked else "it is not clear which column has the labels"
    raise ValueError(
        f"{file}: {found}; give --label-column one of {', '.join(fitting) or '(no column can hold labels)'} (columns: "
        f"{', '.join(schema.names)})"
    )


def _image_column(schema: Any) -> str | None:
    import pyarrow as pa

    def is_image(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    images = [field.name for field in schema if is_image(field.type)]
    return next((name for name in _IMAGE_NAMES if name in images), images[0] if len(images) == 1 else None)


def _may_be_label(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    checks = (types.is_integer, types.is_floating, types.is_boolean, types.is_string, types.is_large_string)
    return any(check(kind) for check in checks)


def _declared_classes(schema: Any, label: str) -> tuple[str, ...]:
    """The names of a ClassLabel feature, which Hugging Face datasets stores in the schema's metadata."""
    try:
        feature = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"][label]
        return tuple(class_name(str(name)) for name in feature["names"])
    except (ValueError, KeyError, TypeError):
        return ()


def _images_and_labels(parquet: Any, group: int, image: str, label: str) -> Iterator[tuple[memoryview | None, Any]]:
    for batch in _batches(parquet, group, [image, label]):
        yield from zip(_binary(batch, image), batch.column(label).to_pylist())


def _batches(parquet: Any, group: int, names: list[str]) -> Iterator[Any]:
    about = parquet.metadata.row_group(group)
    rows = max(1, about.num_rows * BATCH_BYTES // max(1, about.total_byte_size))
    return parquet.iter_batches(batch_size=min(rows, about.num_rows), row_groups=[group], columns=names)


def _binary(batch: Any, image: str) -> list[memoryview | None]:
    """The encoded images as views of the batch's memory; None for a row without bytes."""
    import pyarrow as pa

    column = batch.column(image)
    if pa.types.is_struct(column.type):
        column = column.field("bytes")
    return [memoryview(value.as_buffer()) if value.is_valid else None for value in column]


def _inspect_or_cause(encoded: memoryview | None, label: Label | None) -> tuple[Inspected | None, str]:
    if encoded is None:
        return None, "no bytes in this row (only a path?)"
    if label is None:
        return None, "no label"
    try:
        return inspect_bytes(encoded), ""
    except BadHeader as cause:
        return None, str(cause)


class ParquetReader:
    """Reads images from row groups, of which the most recently used stay in memory."""

    def __init__(self, root: str, records: Records):
        self.root = root
        self.absolute_root = os.path.abspath(root)
        self.records = records
        self._start_empty()

    def _start_empty(self) -> None:
        self.lock = threading.Lock()  # a ParquetFile is not thread-safe
        self.files: dict[int, tuple[Any, str, np.ndarray]] = {}
        self.groups: OrderedDict[tuple[int, int], tuple[list[memoryview | None], int]] = OrderedDict()
        self.cached_bytes = 0

    def __getstate__(self) -> dict:
        return {name: self.__dict__[name] for name in ("root", "absolute_root", "records")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._start_empty()

    def name(self, i: int) -> str:
        records = self.records
        return f"{os.path.join(self.root, records.shards[records.shard_ids[i]])}:{records.positions[i]}"

    def path(self, i: int) -> None:
        return None

    def encoded(self, i: int) -> np.ndarray:
        shard, row = int(self.records.shard_ids[i]), int(self.records.positions[i])
        with self.lock:
            _, _, ends = self._open(shard)
            group = int(np.searchsorted(ends, row, side="right"))
            images = self._group(shard, group)
        first = int(ends[group - 1]) if group else 0
        return np.frombuffer(images[row - first], np.uint8)

    def _open(self, shard: int) -> tuple[Any, str, np.ndarray]:
        if shard not in self.files:
            parquet = _open_parquet(os.path.join(self.absolute_root, self.records.shards[shard]))
            rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
            self.files[shard] = parquet, _image_column(parquet.schema_arrow), np.cumsum(rows)
        return self.files[shard]

    def _group(self, shard: int, group: int) -> list[memoryview | None]:
        if (shard, group) in self.groups:
            self.groups.move_to_end((shard, group))
            return self.groups[shard, group][0]
        parquet, image, _ = self._open(shard)
        images, size = [], 0
        for batch in _batches(parquet, group, [image]):
            images += _binary(batch, image)
            size += batch.nbytes
        self.groups[shard, group] = images, size
        self.cached_bytes += size
        while self.cached_bytes > CACHE_BYTES and len(self.groups) > 1:
            self.cached_bytes -= self.groups.popitem(last=False)[1][1]
        return images
