"""The geometry of a view, vectorised over a batch of images of different sizes.

B images have heights and widths (B,); everything is in pixels, rows first. The view is size x size.
"""

from typing import NamedTuple

import numpy as np

from .draws import Draws, Purpose, integers

TRIES = 10
LONG = 8  # views: of images longer than this only the part around the view is resized; the rest could be gigabytes
PADDING = 4  # of the simple random crop, in pixels of the resized image


class Geometry(NamedTuple):
    """Three steps from image to view: crop `window`, resize it to `resized`, crop size x size at `corner`."""

    window: np.ndarray  # (B, 4) int64  top, left, height, width in the image
    resized: np.ndarray  # (B, 2) int64  height, width
    corner: np.ndarray  # (B, 2) int64  top, left; up to PADDING beyond the border, which is reflected


def random_resized_crop(
    draws: Draws,
    heights: np.ndarray,
    widths: np.ndarray,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Geometry:
    """torchvision's RandomResizedCrop (get_params).

    The area is uniform in scale * image area, log(width / height) uniform in log(ratio); the first of ten tries that
    fits is placed uniformly. If none fits: the largest central window within `ratio`.
    """
    H, W = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    uniform = draws.uniform(Purpose.CROP, 2 * TRIES + 2)
    area = (H * W)[:, None] * (scale[0] + (scale[1] - scale[0]) * uniform[:, :TRIES])
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * uniform[:, TRIES : 2 * TRIES])
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (h > 0) & (w <= W[:, None]) & (h <= H[:, None])
    rows, first = np.arange(len(H)), fits.argmax(1)
    h, w = h[rows, first], w[rows, first]
    top = integers(uniform[:, -2], H - h + 1)
    left = integers(uniform[:, -1], W - w + 1)
    window = np.where(fits.any(1)[:, None], np.stack([top, left, h, w], 1), central_window(H, W, ratio))
    return Geometry(window, np.full((len(H), 2), size), np.zeros((len(H), 2), np.int64))


def central_window(H: np.ndarray, W: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """The largest central window (B, 4) whose width / height lies within `ratio`."""
    h = np.where(W < H * min(ratio), np.rint(W / min(ratio)), H).astype(np.int64)
    w = np.where(W > H * max(ratio), np.rint(H * max(ratio)), W).astype(np.int64)
    return np.stack([(H - h) // 2, (W - w) // 2, h, w], 1)


def shorter_side_to(size: int, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """(B, 2) int64 height and width once the shorter side is `size`, rounded down as torchvision's Resize does."""
    sides = np.stack([heights, widths], 1).astype(np.int64)
    return sides * size // sides.min(1, keepdims=True)


def full_windows(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Windows (B, 4) int64 that cover the full images."""
    return np.stack([np.zeros_like(heights), np.zeros_like(widths), heights, widths], 1).astype(np.int64)


def simple_random_crop(draws: Draws, heights: np.ndarray, widths: np.ndarray, size: int) -> Geometry:
    """DeiT III's simple random crop (facebookresearch/deit, augment.py): the shorter side resized to `size`, padded by
    PADDING pixels of reflection on each side, then a uniformly placed size x size crop."""
    resized = shorter_side_to(size, heights, widths)
    uniform = draws.uniform(Purpose.CROP, 2)
    corner = integers(uniform, resized + 2 * PADDING - size + 1) - PADDING
    return around_view(heights, widths, size, resized, corner, size)


def evaluation_crop(heights: np.ndarray, widths: np.ndarray, size: int, crop_pct: float) -> Geometry:
    """torchvision's Resize(floor(size / crop_pct)) and CenterCrop(size), which rounds half to even."""
    target = int(size / crop_pct)
    resized = shorter_side_to(target, heights, widths)
    return around_view(heights, widths, target, resized, np.rint((resized - size) / 2).astype(np.int64), size)


def around_view(heights, widths, target: int, resized: np.ndarray, corner: np.ndarray, size: int) -> Geometry:
    """The view at `corner` of full images whose shorter side is resized to `target`; if the longer side would exceed
    LONG views, of the part of the image around the view.

    The part begins and ends at multiples of the shorter side, which are multiples of `target` when resized: the pixels
    stay where they were, up to the fraction of a pixel by which `resized` was rounded down.
    """
    sides = np.stack([heights, widths], 1).astype(np.int64)
    shorter = sides.min(1, keepdims=True)
    margin = np.maximum(1, -(-2 // shorter))  # a bicubic filter reaches two pixels of the coarser grid
    long = resized > LONG * size
    first = np.where(long, np.maximum(corner // target - margin, 0), 0)
    last = -(-(corner + size) // target) + margin
    to_the_end = ~long | (last * shorter >= sides)
    begin, end = first * shorter, np.where(to_the_end, sides, last * shorter)
    part = np.where(to_the_end, resized, last * target) - first * target
    return Geometry(np.concatenate([begin, end - begin], 1), part, corner - first * target)
