"""Many strings in two arrays: a million file names take their bytes, pickle fast and are cached as they are."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Names:
    """A read-only sequence of str. Names that are not UTF-8 survive, as in os.fsdecode."""

    blob: np.ndarray  # (bytes,) uint8: all names, one behind the other
    ends: np.ndarray  # (names,) int64: where each ends

    @classmethod
    def pack(cls, names: Iterable[str]) -> "Names":
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum(lengths))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        i = range(len(self.ends))[i]  # IndexError, negative positions
        start = self.ends[i - 1] if i else 0
        return self.blob[start : self.ends[i]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))
