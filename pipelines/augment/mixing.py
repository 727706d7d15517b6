"""Draws of random erasing, mixup and cutmix, which one kernel then applies.

Erasing: Zhong et al., "Random Erasing Data Augmentation", arXiv 1708.04896; mixup: Zhang et al., arXiv 1710.09412;
cutmix: Yun et al., arXiv 1905.04899. The distributions are timm's (random_erasing.py, mixup.py), with one difference:
timm mixes sample i of a process with its sample B - 1 - i; here the neighbours 2i and 2i + 1 of the global order are
mixed, so that nothing depends on the number of processes.

Boxes are (y0, x0, y1, x1) in pixels, y1 and x1 exclusive, all 0 for none. B samples in the batch, an even number.
"""

import numpy as np

from .crop import Size, height_width
from .draws import Draws, Purpose, integers

TRIES = 10
ERASE_AREA = (0.02, 1 / 3)  # fraction of the image
ERASE_ASPECT = (0.3, 1 / 0.3)  # height / width
MODES = ("batch", "pair", "elem")


def draw_erasing(draws: Draws, probability: float, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """(B, 4) int32 boxes and (B,) int64 noise keys; a rectangle is erased with `probability`."""
    uniform = draws.uniform(Purpose.ERASE, 2 * TRIES + 3)
    height, width = height_width(size)
    area = height * width * (ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * uniform[:, :TRIES])
    low, high = np.log(ERASE_ASPECT)
    aspect = np.exp(low + (high - low) * uniform[:, TRIES : 2 * TRIES])
    h = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    w = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (h < height) & (w < width)
    rows, first = np.arange(len(draws)), fits.argmax(1)
    h, w = h[rows, first], w[rows, first]
    top, left = integers(uniform[:, -3], height - h + 1), integers(uniform[:, -2], width - w + 1)
    box = np.stack([top, left, top + h, left + w], 1)
    erased = fits.any(1) & (uniform[:, -1] < probability)
    high_word, low_word = draws.words(Purpose.ERASE_NOISE, 2).T
    seed = ((high_word << np.uint64(30)) ^ low_word).astype(np.int64)
    return np.where(erased[:, None], box, 0).astype(np.int32), seed


def draw_mixing(
    draws: Draws, *, size: Size, mixup: float, cutmix: float, probability: float, switch_probability: float
) -> tuple[np.ndarray, np.ndarray]:
    """One draw for each row of `draws`: lam (N,) float32 and cutmix boxes (N, 4) int32 in an image of `size`.

    mixup, cutmix: the alpha of Beta(alpha, alpha), 0 for off; with both on, cutmix has switch_probability.
    """
    from scipy.special import betaincinv

    happens, switch, quantile, y, x = draws.uniform(Purpose.MIX, 5).T
    if mixup > 0 and cutmix > 0:
        use_cutmix = switch < switch_probability
    else:
        use_cutmix = np.full(len(draws), cutmix > 0)
    alpha = np.where(use_cutmix, cutmix, mixup)
    lam = np.where(happens < probability, betaincinv(alpha, alpha, quantile), 1.0)
    height, width = height_width(size)
    box = _cutmix_box(lam, integers(y, height), integers(x, width), height, width) * use_cutmix[:, None]
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    lam = np.where(use_cutmix, 1 - area / (height * width), lam)
    return lam.astype(np.float32), np.where(area[:, None] > 0, box, 0).astype(np.int32)


def _cutmix_box(lam: np.ndarray, y: np.ndarray, x: np.ndarray, height: int, width: int) -> np.ndarray:
    """A rectangle of the image's proportions and (1 - lam) of its area around (y, x), clipped at the borders."""
    h, w = ((side * np.sqrt(1 - lam)).astype(np.int64) for side in (height, width))
    box = np.stack([y - h // 2, x - w // 2, y + (h + 1) // 2, x + (w + 1) // 2], 1)
    return np.clip(box, 0, [height, width, height, width])


def mixing_rows(mode: str, seed: int, epoch: int, steps: np.ndarray, indices: np.ndarray, copies: np.ndarray) -> Draws:
    """The draws that decide: one row for each step ("batch"), for each "pair" or for each sample ("elem")."""
    if mode == "batch":
        return Draws(seed, epoch, steps, np.zeros_like(steps))
    if mode == "pair":
        return Draws(seed, epoch, indices[0::2], indices[1::2])
    return Draws(seed, epoch, indices, copies)


def spread_over_batch(
    mode: str, lam: np.ndarray, box: np.ndarray, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of `mixing_rows` expanded to samples: partner (N,) int64, lam (N,) float32, box (N, 4) int32."""
    times = {"batch": batch_size, "pair": 2, "elem": 1}[mode]
    lam, box = np.repeat(lam, times), np.repeat(box, times, axis=0)
    position = np.arange(len(lam)) % batch_size
    return np.where(lam < 1, position ^ 1, position), lam, box
