"""Labels as numbers or names, as shards store them, turned into positions among the classes."""

from collections.abc import Sequence

import numpy as np


def number_labels(stored: Sequence[int | str], declared: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...], bool]:
    """(labels (n,) int64, classes, whether the classes have names).

    stored: all numbers, or all names. declared: names in the order of the labels, () if nobody wrote them down; then
    names are sorted, and numbers 0..max are named by themselves. Raises ValueError for labels outside the declared
    ones, for negative numbers and for a mixture of both kinds.
    """
    numbers = [label for label in stored if isinstance(label, int)]
    if numbers and len(numbers) < len(stored):
        raise ValueError(f"the shards mix labels that are numbers ({numbers[0]}) and names: write all in one way")
    if numbers:
        return _check_numbers(np.array(numbers, np.int64), declared)
    return _number_names(stored, declared)


def _check_numbers(labels: np.ndarray, declared: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...], bool]:
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise ValueError(f"the shards hold the negative label {low}: labels count from 0")
    if declared and high >= len(declared):
        raise ValueError(f"the shards hold the label {high}, but only {len(declared)} class names are declared")
    return labels, declared or tuple(map(str, range(high + 1))), bool(declared)


def _number_names(stored: Sequence[str], declared: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...], bool]:
    classes = declared or tuple(sorted(set(stored)))
    place = {name: label for label, name in enumerate(classes)}
    if unknown := set(stored) - set(place):
        raise ValueError(f"the shards hold the class {min(unknown)}, which is not among the declared class names")
    return np.array([place[name] for name in stored], np.int64), classes, True
