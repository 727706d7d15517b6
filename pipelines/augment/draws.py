"""Counter-based random numbers: each draw is a pure function of its key and counter, with no generator state.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a key of two
32-bit words and a counter of four into four random words. Here, for all samples of a batch at once,

    key      seed, epoch
    counter  index of the image, copy (repeated augmentation), block 0, 1, 2 ... of four words, purpose

so the view of an image depends neither on its batch, nor on its position in the epoch, nor on the number of processes.
Written here because NumPy's Philox is a generator with one key and a position in its stream: a batch of images would
need a generator each.
"""

from enum import IntEnum

import numpy as np

MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


class Purpose(IntEnum):
    """The last word of the counter: no two purposes share random numbers."""

    CROP = 1
    FLIP = 2
    RAND_AUGMENT = 3
    THREE_AUGMENT = 4
    COLOR_JITTER = 5
    ERASE = 6
    ERASE_NOISE = 7
    MIX = 8
    REPLACE = 9
    HELD_OUT = 10


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """counter: (4, ...) uint64 holding 32-bit words; key: two 32-bit words. Returns (4, ...) uint64 of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (product1 >> HALF) ^ c1 ^ np.uint64(k0)
        c2 = (product0 >> HALF) ^ c3 ^ np.uint64(k1)
        c1, c3 = product1 & WORD, product0 & WORD
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


class Draws:
    """The random numbers of B samples, each identified by its index and copy; (B,) integers in [0, 2**32).

    The same call returns the same numbers. Raises ValueError if seed or epoch is outside [0, 2**32).
    """

    def __init__(self, seed: int, epoch: int, index: np.ndarray, copy: np.ndarray):
        for name, value in (("seed", seed), ("epoch", epoch)):
            if not 0 <= value < 2**32:
                raise ValueError(f"{name} must be in [0, 2**32), got {value}")
        self.key, self.epoch = (seed, epoch), epoch
        self.index = np.asarray(index).astype(np.uint64)
        self.copy = np.asarray(copy).astype(np.uint64)

    def __len__(self) -> int:
        return len(self.index)

    def words(self, purpose: Purpose, count: int) -> np.ndarray:
        """(B, count) uint64, uniform 32-bit words."""
        blocks = -(-count // 4)
        counter = np.empty((4, len(self), blocks), np.uint64)
        counter[0], counter[1] = self.index[:, None], self.copy[:, None]
        counter[2], counter[3] = np.arange(blocks, dtype=np.uint64), np.uint64(purpose)
        words = philox4x32(counter, self.key)
        return np.moveaxis(words, 0, -1).reshape(len(self), 4 * blocks)[:, :count]

    def uniform(self, purpose: Purpose, count: int) -> np.ndarray:
        """(B, count) float64, uniform on the open interval (0, 1), in steps of 2**-32."""
        return (self.words(purpose, count) + 0.5) * 2.0**-32


def integers(uniform: np.ndarray, upper: np.ndarray | int) -> np.ndarray:
    """Uniform numbers in (0, 1) to uniform integers in [0, upper); int64."""
    return (uniform * upper).astype(np.int64)
