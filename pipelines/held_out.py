"""A share of the training images for validation, where a data set has no validation images of its own."""

from dataclasses import replace

import numpy as np

from .augment.draws import Draws, Purpose
from .index.image_index import Index


def hold_out(index: Index, share: float, seed: int) -> tuple[Index, Index]:
    """(the other images, the share of each class that is held out): a function of seed and the list of images alone.

    share: in (0, 1), of each class, rounded; at least one image of it is held out and one is left. A class of a single
        image is left.
    """
    held_out = chosen(index.labels, share, seed)
    left, taken = (index.take(np.flatnonzero(rows)) for rows in (~held_out, held_out))
    return replace(left, bad=index.bad), replace(taken, split="val")


def chosen(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """(n,) bool, which of n images are held out. labels: (n,) int64; images without a label (-100) are not."""
    n = len(labels)
    numbers = Draws(seed, 0, np.arange(n), np.zeros(n)).words(Purpose.HELD_OUT, 1)[:, 0]
    order = np.lexsort((numbers, labels))  # by class, and at random within it
    _, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    place = np.arange(n) - np.repeat(first, sizes)  # within the class
    wanted = np.where(sizes > 1, np.clip(np.rint(sizes * share), 1, sizes - 1), 0)
    held_out = np.empty(n, bool)
    held_out[order] = place < np.repeat(wanted, sizes)
    return held_out & (labels >= 0)
