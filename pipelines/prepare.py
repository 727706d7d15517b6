"""Re-encode a data set once: smaller images, in few large files, for large photos and slow disks.

    python -m fastdeit.pipelines.prepare DIR OUT

DIR is any data set that open_index reads (class folders, WebDataset, Parquet; train, val or both). OUT receives
WebDataset shards (train-000000.tar ...), classes.txt and bad_files.txt, and is then used instead of DIR. Images keep
their order and labels; bad ones are listed and omitted.

It may be killed at any time: the same command then writes the shards that are missing. A shard is written under a
temporary name and renamed when it is complete, and its bytes depend only on the images and the settings.
"""

import json
import logging
import multiprocessing as mp
import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import cli
from .bad_files import BadFiles
from .index.image_index import Index, open_index
from .index.layout import list_split, splits

SETTINGS = "prepare.json"
FORMAT = 2  # raise it when the same settings give other shards


class Shard(NamedTuple):
    """A range of images that becomes one file."""

    file: Path
    start: int
    stop: int

    @property
    def temporary(self) -> Path:
        return self.file.with_name(f".{self.file.name}.tmp")


def prepare(
    dir: str,
    out: str,
    /,
    size: int = 288,
    quality: int = 92,
    workers: int | None = None,
    images_per_shard: int = 2500,
    max_bad: float = 0.01,
    label_column: str | None = None,
) -> None:
    """Re-encode DIR's images, smaller, as shards in OUT. Run it again to resume.

    Args:
        dir: The data set: DIR/train/CLASS/*.jpg (and val), tar shards or Parquet files.
        out: A new folder for the shards, or one to resume.
        size: Pixels of the shorter side; smaller images are not scaled up. 288 is for training at 224.
        quality: Of the JPEGs, 1 to 95.
        workers: Processes; one per core if not given.
        images_per_shard: Images in a tar file.
        max_bad: Stop if more than this fraction of the images cannot be read.
        label_column: Label column of Parquet files; by default label, labels, ..., or the one with class names.
    """
    _check(size, quality, workers, images_per_shard, max_bad)
    indexes = _open_splits(dir, label_column)
    root = Path(out)
    settings = {"format": FORMAT, "size": size, "quality": quality, "images_per_shard": images_per_shard}
    _begin(root, settings | {split: index.fingerprint for split, index in indexes.items()}, dir)
    classes = next(iter(indexes.values())).classes
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    for split, index in indexes.items():
        bad_files = BadFiles.of(index, limit=max_bad, path=root / "bad_files.txt")
        _write_split(index, _shards(root, split, len(index), images_per_shard), size, quality, workers, bad_files)
    _report(root, indexes)


def _check(size: int, quality: int, workers: int | None, images_per_shard: int, max_bad: float) -> None:
    for flag, value in (("--size", size), ("--images-per-shard", images_per_shard), ("--workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value}: must be at least 1")
    if not 1 <= quality <= 95:
        raise ValueError(f"--quality {quality}: must be from 1 to 95 (above, files only grow)")
    if not 0 <= max_bad <= 1:
        raise ValueError(f"--max-bad {max_bad}: must be a fraction from 0 to 1")


def _open_splits(source: str, label_column: str | None) -> dict[str, Index]:
    found = splits(source)
    if not found:
        list_split(source, "train")  # raises, with what was expected
    indexes: dict[str, Index] = {}
    for split in found:
        classes = indexes["train"].classes if "train" in indexes else None
        indexes[split] = open_index(source, split, classes=classes, label_column=label_column)
    return indexes


def _begin(root: Path, settings: dict, source: str) -> None:
    """Make OUT, or check that it was begun with the same images and settings."""
    file = root / SETTINGS
    if file.exists():
        begun = json.loads(file.read_text())
        other = [name for name in settings.keys() | begun.keys() if settings.get(name) != begun.get(name)]
        if other:
            raise ValueError(
                f"{root} was begun with other images or settings ({', '.join(sorted(other))}) than {source} has now: "
                "delete it or choose another folder"
            )
        return
    if root.exists() and any(name != f".{SETTINGS}.tmp" for name in os.listdir(root)):
        raise ValueError(f"{root} is not empty and was not made by this command: choose another folder")
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".{SETTINGS}.tmp"
    temporary.write_text(json.dumps(settings, indent=1))
    os.replace(temporary, file)


def _shards(root: Path, split: str, total: int, images_per_shard: int) -> list[Shard]:
    return [
        Shard(root / f"{split}-{number:06d}.tar", start, min(start + images_per_shard, total))
        for number, start in enumerate(range(0, total, images_per_shard))
    ]


def _write_split(
    index: Index, shards: list[Shard], size: int, quality: int, workers: int | None, bad_files: BadFiles
) -> None:
    from . import reencode  # needs Pillow, which cli.run names if it is missing

    missing = [shard for shard in shards if not shard.file.exists()]
    if not missing:
        return
    finished = len(index) - sum(shard.stop - shard.start for shard in missing)
    workers = min(workers or len(os.sched_getaffinity(0)), len(missing))
    what = f"{shards[0].file.name.partition('-')[0]} images"
    with _pool(workers) as (pool, images_done), cli.show_progress(what, len(index), finished) as progress:
        jobs = {
            pool.submit(
                reencode.write_shard,
                index.take(np.arange(shard.start, shard.stop)),
                shard.start,
                shard.temporary,
                size,
                quality,
            ): shard
            for shard in missing
        }
        pending = set(jobs)
        while pending:
            ready, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            progress(finished + images_done.value)
            for job in ready:
                # Reported before the shard counts as written: after a stop in between, both are repeated.
                for bad in job.result():
                    bad_files.report(bad.name, bad.cause)
                os.replace(jobs[job].temporary, jobs[job].file)


@contextmanager
def _pool(workers: int) -> Iterator:
    """Worker processes and the number of images they have written; an error stops them in the middle of a shard.

    Raises ChildProcessError if one of them was killed.
    """
    from . import reencode

    context = mp.get_context("forkserver")  # no fork of a process with threads; imports once
    context.set_forkserver_preload([reencode.__name__])
    images_done, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(workers, context, reencode.start_worker, (images_done, stop))
    try:
        yield pool, images_done
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker was killed, perhaps for lack of memory: run the command again with fewer --workers"
        ) from error
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _report(root: Path, indexes: dict[str, Index]) -> None:
    """Open what was written, and say what it contains."""
    for split, index in indexes.items():
        written = open_index(root, split, classes=index.classes)
        bad = len(index) + sum(one.images for one in index.bad) - len(written)
        omitted = f", {bad} bad ones omitted ({root / 'bad_files.txt'})" if bad else ""
        print(f"{split}: {len(written):,} images of {len(index.classes)} classes in {root}{omitted}")


def main() -> None:
    logging.basicConfig(format="%(message)s")
    cli.run(
        prepare, "python -m fastdeit.pipelines.prepare", {"dir": "DIR", "out": "OUT"},
        stopped="stopped; the same command resumes",
    )  # fmt: skip


if __name__ == "__main__":
    main()
