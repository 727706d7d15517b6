"""The layout of a data set's folder: which files belong to a split, as class folders, tar shards or Parquet files."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from fastdeit.pipelines.bad_files import printable

from . import folder
from .labels import class_name
from .records import Listing

# Other names under which a validation split is found, tried in this order if there is no 'val'.
_OTHER_NAMES = {"val": ("validation", "valid", "test")}

# The shards of a split, relative to the data set's folder.
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
    """Find and list the files of a split. Raises ValueError if there are none, or more than one layout fits."""
    if not os.path.isdir(path):
        raise ValueError(f"there is no folder {path}: give the folder that holds {split}/")
    for name in (split, *_OTHER_NAMES.get(split, ())):
        if found := _candidates(Path(path), name):
            listing = _the_only(found, path, name)
            instead = f"{_where(listing, name)} is used as '{split}', which does not exist"
            return replace(listing, split=name, notes=listing.notes if name == split else (instead, *listing.notes))
    raise ValueError(f"{path} has no split '{split}': {_EXPECTED.format(split=split)}; it holds {_contents(path)}")


def _where(listing: Listing, name: str) -> str:
    return f"the folder '{name}'" if listing.kind == "folder" else f"'{name}' ({listing.files[0]}, ...)"


def splits(path: str | os.PathLike) -> list[str]:
    """Which of the splits train and val exist; val under any of its names."""
    return [split for split in ("train", "val") if name_of_split(path, split) is not None]


def name_of_split(path: str | os.PathLike, split: str) -> str | None:
    """The name under which the split would be opened, such as "test" for "val"; None if it is not there."""
    names = (split, *_OTHER_NAMES.get(split, ()))
    return next((name for name in names if os.path.isdir(path) and _holds(Path(path), name)), None)


def list_classes(path: str) -> Listing:
    """path/CLASS/**, no splits."""
    if not os.path.isdir(path):
        raise ValueError(f"there is no folder {path}: give the folder that holds the class folders")
    return _list_class_folders(Path(path), "")


def _holds(path: Path, split: str) -> bool:
    return (path / split).is_dir() or any(_matches(path, patterns, split) for patterns in (_TAR, _PARQUET))


def _candidates(path: Path, split: str) -> list[Listing]:
    inside = path / split
    shards = {kind: _matches(path, patterns, split) for kind, patterns in (("webdataset", _TAR), ("parquet", _PARQUET))}
    within = [file for files in shards.values() for file in files if Path(file).parent == Path(split)]
    folders = None
    if inside.is_dir() and not (within and folder.holds_no_images(str(inside))):
        folders = _list_class_folders(path, split)
    if folders and within:  # such as archives of one class each, as of ImageNet
        note = f"class folders and {within[0]} are both in {split}/: the class folders are used"
        folders = replace(folders, notes=(note, *folders.notes))
        shards = {kind: [file for file in files if file not in within] for kind, files in shards.items()}
    found = [_list_shards(kind, path, files) for kind, files in shards.items() if files]
    return [folders, *found] if folders else found


def _the_only(found: list[Listing], path: str, split: str) -> Listing:
    if len(found) > 1:
        kinds = " and ".join(f"{listing.kind} ({listing.files[0]})" for listing in found)
        raise ValueError(
            f"{path} holds the split '{split}' more than once, as {kinds}: keep one of them in this folder"
        )
    return found[0]


def _matches(path: Path, patterns: tuple[str, ...], split: str) -> list[str]:
    files = {file for pattern in patterns for file in path.glob(pattern.format(split=split)) if not file.is_dir()}
    return sorted(str(file.relative_to(path)) for file in files if not folder.is_ignored(file.name))


def _list_shards(kind: str, path: Path, files: list[str]) -> Listing:
    sizes, mtimes = folder.stat_columns([folder.size_and_mtime(path / file) for file in files])
    return Listing(kind, str(path), files, sizes, mtimes, _class_names(path))


def _class_names(path: Path) -> tuple[str, ...]:
    for name in _CLASS_NAME_FILES:
        if (path / name).is_file():
            return read_class_names(path / name)
    return ()


def read_class_names(path: str | os.PathLike) -> tuple[str, ...]:
    """The lines of a text file in UTF-8 (or UTF-16 with a byte order mark): one class each, in the order of the labels.

    Raises ValueError for a file in another encoding, an empty line before the last class and a class named twice.
    """
    try:
        stored = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}): give a text file with a class on each line"
        ) from None
    try:
        text = stored.decode("utf-16" if stored[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8").lstrip("\ufeff")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not a text file in UTF-8: save it as one") from None
    names = [class_name(line.strip()) for line in text.rstrip().split("\n")] if text.strip() else []
    if "" in names:
        raise ValueError(
            f"{path}: line {names.index('') + 1} is empty: add the class that is missing, or delete the line"
        )
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"{path}: names the class {twice[0]} more than once")
    return tuple(names)


def _list_class_folders(path: Path, split: str) -> Listing:
    listing = folder.list_class_folders(str(path), split)
    if not listing.classes:
        raise ValueError(
            f"{path / split} has no class folders: expected {Path(split) / 'CLASS'}/*.jpg, it holds "
            f"{_contents(path / split)}; open_folder reads images without labels"
        )
    if not listing.files:
        raise ValueError(
            f"the {len(listing.classes)} class folders of {path / split} hold no images "
            f"({', '.join(sorted(folder.IMAGE_EXTENSIONS))})"
        )
    return listing


def _contents(path: str | Path) -> str:
    names = sorted(map(printable, os.listdir(path)))
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return shown or "nothing"
