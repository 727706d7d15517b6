"""Labelled images and images without labels, as one index."""

import hashlib
from functools import cached_property

import numpy as np

from .index import Index
from .records import UNLABELLED


class WithUnlabelled:
    """The images of `labelled`, then those of `unlabelled`, whose labels do not count: all -100. For the loaders.

    The first positions and the classes are those of `labelled`. One may be a folder and the other shards.
    """

    def __init__(self, labelled: Index, unlabelled: Index):
        self.parts = (labelled, unlabelled)
        self.classes = labelled.classes
        self.labels = np.concatenate([labelled.labels, np.full(len(unlabelled), UNLABELLED, np.int64)])
        self.heights = np.concatenate([labelled.heights, unlabelled.heights])
        self.widths = np.concatenate([labelled.widths, unlabelled.widths])
        self.encoded_bytes = np.concatenate([labelled.encoded_bytes, unlabelled.encoded_bytes])
        self.bad = labelled.bad + unlabelled.bad
        # A decoder reads either files or bytes: bytes, unless all images are files.
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
