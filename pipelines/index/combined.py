"""Indices made of others: with images that have no labels, and with images that come several times."""

import hashlib
from functools import cached_property

import numpy as np

from .image_index import Index
from .labels import UNLABELLED


class WithUnlabelled:
    """The images of `labelled`, then those of `unlabelled` with the label -100, as one index for the loaders.

    The classes are those of `labelled`. One may be a folder and the other shards.
    """

    def __init__(self, labelled: Index, unlabelled: Index):
        self.parts = (labelled, unlabelled)
        self.classes = labelled.classes
        self.labels = np.concatenate([labelled.labels, np.full(len(unlabelled), UNLABELLED, np.int64)])
        self.heights = np.concatenate([labelled.heights, unlabelled.heights])
        self.widths = np.concatenate([labelled.widths, unlabelled.widths])
        self.encoded_bytes = np.concatenate([labelled.encoded_bytes, unlabelled.encoded_bytes])
        self.bad = labelled.bad + unlabelled.bad
        # The decoder reads either files or bytes: files only if all images are files.
        self.all_are_files = all(part.path(0) is not None for part in self.parts)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        part, place = self._find(i)
        return part.name(place)

    def path(self, i: int) -> str | None:
        part, place = self._find(i)
        return part.path(place) if self.all_are_files else None

    def encoded(self, i: int) -> np.ndarray:
        part, place = self._find(i)
        return part.encoded(place)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of both parts' fingerprints."""
        return hashlib.sha256(" ".join(part.fingerprint for part in self.parts).encode()).hexdigest()

    def _find(self, i: int) -> tuple[Index, int]:
        first = len(self.parts[0])
        return (self.parts[0], i) if i < first else (self.parts[1], i - first)


class Repeated:
    """`length` images: those of `index` in their order, each as often as the others or once more. Every occurrence
    is an image of its own, augmented differently.
    """

    def __init__(self, index: Index, length: int):
        self.index, self.classes, self.bad = index, index.classes, index.bad
        self.places = np.arange(length) * len(index) // length
        self.labels, self.heights, self.widths = (
            array[self.places] for array in (index.labels, index.heights, index.widths)
        )
        self.encoded_bytes = index.encoded_bytes[self.places]

    def __len__(self) -> int:
        return len(self.places)

    def name(self, i: int) -> str:
        return self.index.name(self.places[i])

    def path(self, i: int) -> str | None:
        return self.index.path(self.places[i])

    def encoded(self, i: int) -> np.ndarray:
        return self.index.encoded(self.places[i])

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the index's fingerprint and the length."""
        return hashlib.sha256(f"{self.index.fingerprint} {len(self)}".encode()).hexdigest()
