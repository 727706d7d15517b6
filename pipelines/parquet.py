"""Parquet files of encoded images, as Hugging Face datasets writes them: image struct<bytes, path>, integer label.

Parquet is compressed by row groups (100 images in those of the Hub), and the whole group is read to get at one image.
Groups are kept in memory up to CACHE_BYTES, which makes a small data set fully resident. A larger one in random order
reads about a row group an image; `python -m fastdeit.pipelines.prepare` turns it into shards once and for all.
"""

import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .inspection import BadHeader, Inspected, columns, inspect_bytes
from .labels import number_labels
from .names import Names
from .records import BadFile, Listing, Records

log = logging.getLogger(__name__)

CACHE_BYTES = 1 << 30
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class")


class Row(NamedTuple):
    """One good image of the index."""

    label: int | str
    encoded_bytes: int
    header: Inspected
    shard_id: int
    position: int  # row of the file


def read_records(listing: Listing) -> Records:
    """Read every image's header; Parquet makes us read the images for it."""
    rows: list[Row] = []
    bad: list[BadFile] = []
    classes = listing.classes
    for shard_id, file in enumerate(listing.files):
        declared = _read_file(listing.root, file, shard_id, rows, bad)
        classes = classes or declared
    _advise(sum(row.encoded_bytes for row in rows), listing.root)
    labels, classes, named = number_labels([row.label for row in rows], classes)
    return Records(
        names=Names.pack(str(row.position) for row in rows),
        sizes=np.array([row.encoded_bytes for row in rows], np.int64),
        labels=labels,
        **columns([row.header for row in rows]),
        classes=classes,
        classes_are_named=named,
        bad=tuple(bad),
        shards=tuple(listing.files),
        shard_ids=np.array([row.shard_id for row in rows], np.int32),
        positions=np.array([row.position for row in rows], np.int64),
    )


def _read_file(root: str, file: str, shard_id: int, rows: list[Row], bad: list[BadFile]) -> tuple[str, ...]:
    """Append to `rows` and `bad`; the class names that the file declares."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(os.path.join(root, file), memory_map=True) as parquet:
            image, label = _columns(parquet.schema_arrow, file)
            for position, (encoded, its_label) in enumerate(_images_and_labels(parquet, image, label)):
                header, cause = _inspected_or_cause(encoded, its_label)
                if cause:
                    bad.append(BadFile(f"{file}:{position}", cause))
                else:
                    rows.append(Row(its_label, len(encoded), header, shard_id, position))
            return _declared_classes(parquet.schema_arrow, label)
    except (OSError, pa.ArrowException) as error:
        bad.append(BadFile(file, f"cannot be read as Parquet ({error})"))
        return ()


def _advise(total: int, root: str) -> None:
    if total > CACHE_BYTES:
        log.warning(
            "%s: reading %.0f GiB of Parquet in random order is slow; turn it into shards once with "
            "`python -m fastdeit.pipelines.prepare %s OUT`",
            root,
            total / 2**30,
            root,
        )


def _columns(schema: Any, file: str) -> tuple[str, str]:
    """The names of the image and the label column. Raises ValueError if it is not clear which they are."""
    import pyarrow as pa

    def is_image(field: pa.Field) -> bool:
        binary = field.type
        if pa.types.is_struct(binary) and binary.get_field_index("bytes") >= 0:
            binary = binary.field("bytes").type
        return pa.types.is_binary(binary) or pa.types.is_large_binary(binary)

    def is_label(field: pa.Field) -> bool:
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            return field.name in _LABEL_NAMES  # any other text may be a caption or a file name
        return pa.types.is_integer(field.type)

    images = [field.name for field in schema if is_image(field)]
    labels = [field.name for field in schema if is_label(field)]
    image = _choose(images, _IMAGE_NAMES, "encoded images", schema, file)
    return image, _choose(labels, _LABEL_NAMES, "labels", schema, file)


def _choose(fitting: list[str], usual: tuple[str, ...], what: str, schema: Any, file: str) -> str:
    by_name = [name for name in usual if name in fitting]
    if by_name:
        return by_name[0]
    if len(fitting) == 1:
        return fitting[0]
    raise ValueError(
        f"{file}: no column is clearly the one of the {what} (columns: {', '.join(schema.names)}); name it '{usual[0]}'"
    )


def _declared_classes(schema: Any, label: str) -> tuple[str, ...]:
    """The names of a ClassLabel feature, which Hugging Face datasets keeps in the schema's metadata."""
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(label, {})
    return tuple(feature.get("names") or ()) if isinstance(feature, dict) else ()


def _images_and_labels(parquet: Any, image: str, label: str) -> Iterator[tuple[memoryview | None, Any]]:
    for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group, columns=[image, label])
        labels = table.column(label).to_pylist()
        yield from zip(_binary(table, image), labels)


def _binary(table: Any, image: str) -> list[memoryview | None]:
    """The encoded images of a row group as views of its memory; None where a row holds no bytes."""
    import pyarrow as pa

    column = table.column(image).combine_chunks()
    if pa.types.is_struct(column.type):
        column = column.field("bytes")
    return [memoryview(value.as_buffer()) if value.is_valid else None for value in column]


def _inspected_or_cause(encoded: memoryview | None, label: Any) -> tuple[Inspected | None, str]:
    if encoded is None:
        return None, "no bytes in this row (an image that is only a path?)"
    if label is None:
        return None, "no label"
    try:
        return inspect_bytes(encoded), ""
    except BadHeader as cause:
        return None, str(cause)


class ParquetReader:
    """Encoded images out of row groups, of which the latest used stay in memory."""

    def __init__(self, root: str, records: Records):
        self.root = root
        self.absolute_root = os.path.abspath(root)
        self.records = records
        self._start_empty()

    def _start_empty(self) -> None:
        self.lock = threading.Lock()  # a ParquetFile serves one thread at a time
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
            import pyarrow.parquet as pq

            file = self.records.shards[shard]
            parquet = pq.ParquetFile(os.path.join(self.absolute_root, file), memory_map=True)
            rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
            self.files[shard] = parquet, _columns(parquet.schema_arrow, file)[0], np.cumsum(rows)
        return self.files[shard]

    def _group(self, shard: int, group: int) -> list[memoryview | None]:
        if (shard, group) in self.groups:
            self.groups.move_to_end((shard, group))
            return self.groups[shard, group][0]
        parquet, image, _ = self._open(shard)
        table = parquet.read_row_group(group, columns=[image])
        self.groups[shard, group] = images, size = _binary(table, image), table.nbytes
        self.cached_bytes += size
        while self.cached_bytes > CACHE_BYTES and len(self.groups) > 1:
            self.cached_bytes -= self.groups.popitem(last=False)[1][1]
        return images
