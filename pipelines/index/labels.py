"""Labels as data sets store them, numbers or names, and the classes they stand for."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fastdeit.pipelines.bad_files import printable

UNLABELLED = -100  # the label of an image that has none; PyTorch's cross_entropy ignores it
Label = int | str
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)")  # as str() writes it: 007 is a name


def label_of(stored: Any) -> Label | None:
    """A stored value as a label: integers, integral floats, booleans, names, digits. None for any other value."""
    if isinstance(stored, bool):
        return str(stored)
    if isinstance(stored, bytes):
        stored = stored.decode("utf-8", "surrogateescape")
    if isinstance(stored, str):
        return class_name(stored.strip()) or None
    if isinstance(stored, float):
        return int(stored) if stored.is_integer() else None
    return stored if isinstance(stored, int) else None


def number_labels(stored: Sequence[Label], declared: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...], bool]:
    """(labels (n,) int64, classes, whether the classes were declared).

    stored: from label_of: all numbers (or digits), or all names
    declared: the class names in the order of the labels; if (), the classes are the values that occur, names sorted as
        strings, numbers as numbers

    Raises ValueError for labels that are not declared, negative numbers, and a mixture of numbers and names.
    """
    if all(isinstance(label, int) or is_number(label) for label in stored) and set(stored).isdisjoint(declared):
        return _number_numbers([int(label) for label in stored], declared)
    if numbers := [label for label in stored if isinstance(label, int)]:
        raise ValueError(
            f"the shards mix labels that are numbers ({numbers[0]}) and names: write all of them in one way"
        )
    classes = declared or tuple(sorted(set(stored)))
    place = {name: label for label, name in enumerate(classes)}
    if unknown := set(stored) - set(place):
        raise ValueError(f"the shards hold the class {min(unknown)}, which is not among the declared class names")
    return np.array([place[name] for name in stored], np.int64), classes, bool(declared)


def is_number(name: str) -> bool:
    return _NUMBER.fullmatch(name) is not None


def all_numbers(names: Iterable[str]) -> bool:
    return all(map(is_number, names))


def natural_order(classes: Sequence[str]) -> list[str]:
    """Sorted with the numbers in names compared as numbers, as timm sorts class folders: 2 before 10."""
    parts = {name: re.split(r"(\d+)", name.lower()) for name in classes}
    return sorted(classes, key=lambda name: [int(part) if part.isdecimal() else part for part in parts[name]])


def _number_numbers(stored: list[int], declared: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...], bool]:
    if stored and max(stored) >= 2**63:
        raise ValueError(f"the shards hold the label {max(stored)}: it does not fit 64 bits")
    labels = np.array(stored, np.int64)
    values, places = np.unique(labels, return_inverse=True)
    if len(values) and values[0] < 0:
        raise ValueError(
            f"the shards hold the negative label {values[0]}: labels count from 0 "
            "(-1 often means no label, as in a test split)"
        )
    if not declared:
        return places.astype(np.int64), tuple(map(str, values.tolist())), False
    if len(values) and values[-1] >= len(declared):
        raise ValueError(f"the shards hold the label {values[-1]}, but only {len(declared)} class names are declared")
    return labels, declared, True


def class_name(stored: str) -> str:
    """The name of a class as it is compared and shown: printable and in Unicode form NFC, because macOS and Linux use
    different forms."""
    return unicodedata.normalize("NFC", printable(stored))
