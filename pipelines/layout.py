"""Which files under a data set's folder belong to a split: class folders, tar shards or Parquet files."""

import logging
import os
from pathlib import Path

import numpy as np

from . import folder
from .records import Listing

log = logging.getLogger(__name__)

# Other names under which a validation split is found, tried in this order if there is no 'val'.
_OTHER_NAMES = {"val": ("validation", "valid", "test")}

# Where the shards of a split lie, below the data set's folder.
_TAR = ("{split}/*.tar", "{split}.tar", "{split}-*.tar", "*-{split}-*.tar")
_PARQUET = (
    "{split}/*.parquet", "{split}.parquet", "{split}-*.parquet", "data/{split}.parquet", "data/{split}-*.parquet"
)  # fmt: skip
_CLASS_NAME_FILES = ("classes.txt", "classnames.txt")

_EXPECTED = (
    "expected {split}/CLASS/*.jpg (image folder), {split}-*.tar or {split}/*.tar (WebDataset), or {split}-*.parquet "
    "or data/{split}-*.parquet (Parquet)"
)


def list_split(path: str, split: str) -> Listing:
    """Find and list the files of a split. Raises ValueError if there are none, or if there is more than one answer."""
    if not os.path.isdir(path):
        raise ValueError(f"there is no folder {path}: give the folder that holds {split}/")
    for name in (split, *_OTHER_NAMES.get(split, ())):
        if found := _candidates(Path(path), name):
            if name != split:
                log.info("%s: '%s' serves as the split '%s'", path, name, split)
            return _the_only(found, path, name)
    raise ValueError(f"{path} has no split '{split}': {_EXPECTED.format(split=split)}; it holds {_contents(path)}")


def splits(path: str) -> list[str]:
    """Which of the splits train and val there are; val under any of its names."""
    if not os.path.isdir(path):
        return []
    named = {split: (split, *_OTHER_NAMES.get(split, ())) for split in ("train", "val")}
    return [split for split, names in named.items() if any(_holds(Path(path), name) for name in names)]


def _holds(path: Path, split: str) -> bool:
    return (path / split).is_dir() or any(_matches(path, patterns, split) for patterns in (_TAR, _PARQUET))


def _candidates(path: Path, split: str) -> list[Listing]:
    shards = [
        _list_shards(kind, path, files)
        for kind, patterns in (("webdataset", _TAR), ("parquet", _PARQUET))
        if (files := _matches(path, patterns, split))
    ]
    inside = path / split
    if inside.is_dir() and not any(inside.glob("*.tar")) and not any(inside.glob("*.parquet")):
        return [_list_class_folders(path, split), *shards]
    return shards


def _the_only(found: list[Listing], path: str, split: str) -> Listing:
    if len(found) > 1:
        kinds = " and ".join(f"{listing.kind} ({listing.files[0]})" for listing in found)
        raise ValueError(
            f"{path} holds the split '{split}' more than once, as {kinds}: keep one of them in this folder"
        )
    return found[0]


def _matches(path: Path, patterns: tuple[str, ...], split: str) -> list[str]:
    files = {file for pattern in patterns for file in path.glob(pattern.format(split=split))}
    return sorted(str(file.relative_to(path)) for file in files if not file.name.startswith("."))


def _list_shards(kind: str, path: Path, files: list[str]) -> Listing:
    stats = [os.stat(path / file) for file in files]
    return Listing(
        kind,
        str(path),
        files,
        np.array([stat.st_size for stat in stats], np.int64),
        np.array([stat.st_mtime_ns for stat in stats], np.int64),
        _class_names(path),
    )


def _class_names(path: Path) -> tuple[str, ...]:
    for name in _CLASS_NAME_FILES:
        if (path / name).is_file():
            return tuple((path / name).read_text(encoding="utf-8").splitlines())
    return ()


def _list_class_folders(path: Path, split: str) -> Listing:
    listing = folder.list_class_folders(str(path), split)
    if not listing.classes:
        raise ValueError(
            f"{path / split} has no class folders: expected {split}/CLASS/*.jpg, it holds {_contents(path / split)}; "
            "open_folder reads images without labels"
        )
    if not listing.files:
        raise ValueError(
            f"the {len(listing.classes)} class folders of {path / split} hold no images "
            f"({', '.join(sorted(folder.EXTENSIONS))})"
        )
    return listing


def _contents(path: str | Path) -> str:
    names = sorted(os.listdir(path))
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return shown or "nothing"
