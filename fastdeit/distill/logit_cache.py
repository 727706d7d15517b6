"""The logit cache: a folder with a teacher's targets, so that a student trains with no teacher in memory.

CACHE/
    header.json         what the targets depend on: teacher, data, augmentation, versions of what changes pixels
    indices.npy         (epochs, positions) int32: the image at this position of the epoch's order
    labels.npy          (epochs, positions) int16, above 32,768 classes int32: the teacher's argmax      [kind hard]
    classes.npy         (epochs, positions, top), likewise: the likeliest classes, in descending order   [kind soft]
    probabilities.npy   (epochs, positions, top) float16: theirs, at the temperature in the header       [kind soft]
    probe.npy           the first images as the teacher saw them, to detect other pixels
    written/*.jsonl     which rows are on the disk, with checksums: a line per piece and process

An epoch here is one of the training run to come: its order, augmentation and mixing (the header counts them as
"views"). The target at [epoch, position] belongs to the mixed image at that position, so any number of processes finds
its rows by position. The probability that soft targets omit is spread evenly over the other classes (TinyViT, arXiv
2207.10666; microsoft/Cream TinyViT/save_logits.py).

A piece is 50 steps of an epoch. Each process writes and flushes its rows before the line that records them; after a
kill, pieces that lack a line are computed again.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fastdeit.checkpoint import atomic
from fastdeit.errors import UserError

FORMAT = 2
PIECE_STEPS = 50
Piece = tuple[int, int, int]  # epoch, first step, end


def label_dtype(classes: int) -> str:
    return "int16" if classes <= 1 << 15 else "int32"


def arrays_of(header: dict) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of each array."""
    shape, labels = (header["views"], header["positions"]), label_dtype(header["classes"])
    arrays = {"indices": ("int32", shape)}
    if header["kind"] == "hard":
        return arrays | {"labels": (labels, shape)}
    shape = (*shape, header["top"])
    return arrays | {"classes": (labels, shape), "probabilities": ("float16", shape)}


def create(folder: Path, header: dict, probe: np.ndarray) -> None:
    """An empty cache. Its arrays take up disk space only as they are filled."""
    shutil.rmtree(folder / "written", ignore_errors=True)
    (folder / "written").mkdir(parents=True)
    for name, (dtype, shape) in arrays_of(header).items():
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape).flush()
    np.save(folder / "probe.npy", probe)
    atomic.replace_json(folder / "header.json", header)  # last: a folder with a header has all the rest


def read_header(folder: Path) -> dict:
    """Raises UserError if the folder is not a logit cache, or one of another format."""
    try:
        header = json.loads((folder / "header.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder} is not a logit cache: write one with `python -m fastdeit.teach store`") from None
    if header.get("format") != FORMAT:
        raise UserError(
            f"the logit cache {folder} has format {header.get('format')}, this version reads {FORMAT}: write it again"
        )
    return header


def identity(header: dict) -> dict:
    """The part of a header that the targets depend on."""
    free = ("settings", "piece_steps", "teacher_name")
    return {key: value for key, value in header.items() if key not in free}


def pieces_of(header: dict) -> list[Piece]:
    steps = header["positions"] // header["global_batch"]
    length = header["piece_steps"]
    starts = range(0, steps, length)
    return [(epoch, first, min(first + length, steps)) for epoch in range(header["views"]) for first in starts]


def missing(folder: Path, header: dict) -> list[Piece]:
    """The pieces that some process has not written."""
    complete = {piece for piece, _ in _complete(folder)}
    return [piece for piece in pieces_of(header) if piece not in complete]


class Writer:
    """Writes the rows of one process. Raises OSError, with nothing lost, when the disk is full."""

    def __init__(self, folder: Path, header: dict, rank: int, world_size: int):
        self.rank, self.world_size, self.global_batch = rank, world_size, header["global_batch"]
        self.arrays = {name: _array(folder, name, header) for name in arrays_of(header)}
        self.files = {name: os.open(folder / f"{name}.npy", os.O_WRONLY) for name in self.arrays}
        self.log = (folder / "written" / f"rank-{rank:05d}.jsonl").open("ab")
        if self.log.tell():
            self.log.write(b"\n")  # a kill may have truncated the last line

    def write(self, piece: Piece, rows: dict[str, np.ndarray]) -> None:
        """`rows`: for each array (steps, batch, ...), this process's part of each step of the piece."""
        epoch, first, end = piece
        checksum = 0
        for name, content in rows.items():
            array = self.arrays[name]
            content = np.ascontiguousarray(content, array.dtype)
            assert content.shape == (end - first, self.global_batch // self.world_size, *array.shape[2:])
            for step, part in zip(range(first, end), content):
                position = step * self.global_batch + self.rank * len(part)
                offset = array.offset + epoch * array.strides[0] + position * array.strides[1]
                _write_all(self.files[name], part, offset)
            checksum = zlib.crc32(content, checksum)
        for file in self.files.values():
            os.fsync(file)
        line = {"piece": piece, "rank": self.rank, "world_size": self.world_size, "crc32": checksum}
        self.log.write(json.dumps(line).encode() + b"\n")
        self.log.flush()
        os.fsync(self.log.fileno())

    def close(self) -> None:
        for file in self.files.values():
            os.close(file)
        self.log.close()


class LogitCache:
    """A complete logit cache, open for reading. Raises UserError for one that is incomplete."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        self.epochs = self.header["views"]
        left = missing(self.folder, self.header)
        if left:
            pieces = len(pieces_of(self.header))
            raise UserError(
                f"the logit cache {folder} is not complete ({pieces - len(left)} of {pieces} pieces are written): "
                "repeat the command that started it, which resumes where it stopped"
            )
        self.arrays = {name: _array(self.folder, name, self.header) for name in arrays_of(self.header)}

    def rows(self, epoch: int, positions: slice) -> dict[str, np.ndarray]:
        """A copy of the rows at these positions, for each array."""
        return {name: np.array(array[epoch, positions]) for name, array in self.arrays.items()}

    @property
    def fingerprint(self) -> str:
        """Hex digest of the header's identity: equal for two caches with the same targets, wherever they are."""
        return hashlib.sha256(json.dumps(identity(self.header), sort_keys=True).encode()).hexdigest()

    @property
    def probe(self) -> np.ndarray:
        return np.load(self.folder / "probe.npy")

    def damaged(self) -> list[Piece]:
        """The pieces whose checksums differ from those recorded when they were written."""
        return sorted(
            piece
            for piece, checksums in _complete(self.folder)
            if any(self._checksum(piece, rank, len(checksums)) != value for rank, value in checksums.items())
        )

    def _checksum(self, piece: Piece, rank: int, world_size: int) -> int:
        epoch, first, end = piece
        checksum = 0
        for array in self.arrays.values():
            rows = array[epoch, first * self.header["global_batch"] : end * self.header["global_batch"]]
            # (steps, ranks, batch, ...): what this rank wrote of each step.
            rows = rows.reshape(end - first, world_size, -1, *rows.shape[1:])[:, rank]
            checksum = zlib.crc32(np.ascontiguousarray(rows), checksum)
        return checksum


def differences(cached: dict, own: dict, path: str = "") -> list[str]:
    """What differs between the headers of a cache and of a run, in words."""
    found = []
    for key in sorted(cached.keys() | own.keys()):
        a, b = cached.get(key), own.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{path}{key} ")
        elif a != b:
            found.append(f"{path}{key} is {_shown(a)} in the logit cache and {_shown(b)} here")
    return found


def _shown(value) -> str:
    text = json.dumps(value)
    if isinstance(value, str) and len(text) > 60:  # a digest
        return text[:12] + '..."'
    return text if len(text) <= 60 else text[:57] + "..."


def _array(folder: Path, name: str, header: dict) -> np.memmap:
    dtype, shape = arrays_of(header)[name]
    try:
        array = np.load(folder / f"{name}.npy", mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(
            f"the logit cache {folder} is damaged: {name}.npy cannot be read ({error}); write it again"
        ) from error
    if array.dtype != dtype or array.shape != tuple(shape):
        raise UserError(
            f"the logit cache {folder} is damaged: shape or dtype of {name}.npy differs from its header; write it again"
        )
    return array


def _write_all(file: int, content: np.ndarray, offset: int) -> None:
    left = memoryview(content.reshape(-1).view(np.uint8))
    while left:
        count = os.pwrite(file, left, offset)
        left, offset = left[count:], offset + count


def _complete(folder: Path) -> list[tuple[Piece, dict[int, int]]]:
    """The pieces that all processes of some run have written, with the checksum of each rank's rows."""
    written: dict[tuple[Piece, int], dict[int, int]] = {}
    for line in _lines(folder):
        written.setdefault((tuple(line["piece"]), line["world_size"]), {})[line["rank"]] = line["crc32"]
    return [(piece, ranks) for (piece, world_size), ranks in written.items() if len(ranks) == world_size]


def _lines(folder: Path) -> Iterable[dict]:
    """The records of all processes; a line that a kill truncated is skipped."""
    for file in sorted((folder / "written").glob("*.jsonl")):
        for text in file.read_bytes().splitlines():
            try:
                yield json.loads(text)
            except ValueError:
                continue
