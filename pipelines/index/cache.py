"""The index on disk: one .npz a split, valid as long as the list of files (names, sizes, times) is the same."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np

from .records import BadFile, Names, Records

FORMAT = 3  # raise it when the meaning of a stored field changes
_ARRAYS = ("sizes", "labels", "heights", "widths", "rotated", "shard_ids", "positions")


def load(file: Path, key: str) -> Records | None:
    """The stored records, or None if there are none, or they belong to other files, or the file is damaged."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            about = json.loads(stored["about"].tobytes())
            if about["format"] != FORMAT or about["key"] != key:
                return None
            arrays = {name: stored[name] for name in _ARRAYS if name in stored.files}
            names = Names(stored["names"], stored["name_ends"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Records(
        names=names,
        classes=tuple(about["classes"]),
        classes_are_declared=about["classes_are_declared"],
        bad=tuple(BadFile(*bad) for bad in about["bad"]),
        notes=tuple(about["notes"]),
        shards=tuple(about["shards"]),
        **arrays,
    )


def save(file: Path, key: str, records: Records) -> None:
    """Written beside the target and renamed, so that a reader never meets half a file."""
    about = {
        "format": FORMAT,
        "key": key,
        "classes": records.classes,
        "classes_are_declared": records.classes_are_declared,
        "bad": records.bad,
        "notes": records.notes,
        "shards": records.shards,
    }
    arrays = {name: getattr(records, name) for name in _ARRAYS if getattr(records, name) is not None}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as stream:
        np.savez(
            stream,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            names=records.names.blob,
            name_ends=records.names.ends,
            **arrays,
        )
    os.replace(temporary, file)
