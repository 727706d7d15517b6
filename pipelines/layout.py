"""Which files under a data set's folder belong to a split: class folders, tar shards or Parquet files."""

import os
from pathlib import Path

from . import folder
from .records import Listing

# Other names under which a validation split is found, tried in this order if there is no 'val'.
_OTHER_NAMES = {"val": ("validation", "valid", "test")}

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
            return _the_only(found, path, name)
    raise ValueError(f"{path} has no split '{split}': {_EXPECTED.format(split=split)}; it holds {_contents(path)}")


def _candidates(path: Path, split: str) -> list[Listing]:
    inside = path / split
    found = []
    if inside.is_dir() and not any(inside.glob("*.tar")) and not any(inside.glob("*.parquet")):
        found.append(_list_class_folders(path, split))
    return found


def _the_only(found: list[Listing], path: str, split: str) -> Listing:
    if len(found) > 1:
        kinds = " and ".join(f"{listing.kind} ({listing.files[0]})" for listing in found)
        raise ValueError(
            f"{path} holds the split '{split}' more than once, as {kinds}: keep one of them in this folder"
        )
    return found[0]


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
