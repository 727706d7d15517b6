"""The geometry of a view, vectorised over a batch of images of different sizes.

B images have heights and widths (B,); everything is in pixels, rows first. `size` of the view: (height, width), or one
number for a square.
"""

from typing import NamedTuple

import numpy as np

from .draws import Draws, Purpose, integers

TRIES = 10
LONG = 8  # views: of images longer than this only the part around the view is resized; the rest could be gigabytes
PADDING = 4  # of the simple random crop, in pixels of the resized image


Size = int | tuple[int, int]


def height_width(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


class Geometry(NamedTuple):
    """Three steps from image to view: crop `window`, resize it to `resized`, crop the view at `corner`."""

    window: np.ndarray  # (B, 4) int64  top, left, height, width in the image
    resized: np.ndarray  # (B, 2) int64  height, width
    corner: np.ndarray  # (B, 2) int64  top, left; up to PADDING beyond the border, which is reflected


def random_resized_crop(
    draws: Draws,
    heights: np.ndarray,
    widths: np.ndarray,
    size: Size,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Geometry:
    """torchvision's RandomResizedCrop (get_params).

    The area is uniform in scale * image area, log(width / height) uniform in log(ratio); the first of ten tries that
    fits is placed uniformly. If none fits: the largest central window within `ratio`. It is stretched to `size`, as
    there; to keep proportions in a view that is no square, choose `ratio` around its width over height.
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
    return Geometry(window, np.tile(height_width(size), (len(H), 1)), np.zeros((len(H), 2), np.int64))


def central_window(H: np.ndarray, W: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """The largest central window (B, 4) whose width / height lies within `ratio`."""
    h = np.where(W < H * min(ratio), np.rint(W / min(ratio)), H).astype(np.int64)
    w = np.where(W > H * max(ratio), np.rint(H * max(ratio)), W).astype(np.int64)
    return np.stack([(H - h) // 2, (W - w) // 2, h, w], 1)


def resized_to_cover(size: Size, heights: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The smallest size with the image's proportions that covers `size`, (B, 2) int64 height and width; and the side
    that comes out exact: its pixels in the image, and in `size`, (B, 1) each.

    For a square it is the shorter side, and the other is rounded down, as by torchvision's Resize; else rounded to the
    nearest, as by timm's ResizeKeepRatio.
    """
    sides, target = np.stack([heights, widths], 1).astype(np.int64), np.array(height_width(size))
    exact = (sides[:, :1] * target[1] > sides[:, 1:] * target[0]).astype(np.int64)  # 1 where the width decides
    side, wanted = np.take_along_axis(sides, exact, 1), target[exact]
    if target[0] == target[1]:
        return sides * wanted // side, side, wanted
    return np.rint(sides * wanted / side).astype(np.int64), side, wanted


def full_windows(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Windows (B, 4) int64 that cover the full images."""
    return np.stack([np.zeros_like(heights), np.zeros_like(widths), heights, widths], 1).astype(np.int64)


def simple_random_crop(draws: Draws, heights: np.ndarray, widths: np.ndarray, size: Size) -> Geometry:
    """DeiT III's simple random crop (facebookresearch/deit, augment.py): resized to cover `size`, padded by PADDING
    pixels of reflection on each side, then a uniformly placed crop."""
    resized, side, target = resized_to_cover(size, heights, widths)
    uniform = draws.uniform(Purpose.CROP, 2)
    corner = integers(uniform, resized + 2 * PADDING - np.array(height_width(size)) + 1) - PADDING
    return around_view(heights, widths, side, target, resized, corner, size)


def evaluation_crop(heights: np.ndarray, widths: np.ndarray, size: Size, crop_pct: float) -> Geometry:
    """Resized to cover floor(size / crop_pct), as by torchvision's Resize or timm's ResizeKeepRatio, then
    CenterCrop(size), which rounds half to even."""
    height, width = (int(side / crop_pct) for side in height_width(size))
    resized, side, target = resized_to_cover((height, width), heights, widths)
    corner = np.rint((resized - np.array(height_width(size))) / 2).astype(np.int64)
    return around_view(heights, widths, side, target, resized, corner, size)


def around_view(heights, widths, side, target, resized: np.ndarray, corner: np.ndarray, size: Size) -> Geometry:
    """The view at `corner` of full images of which one `side` is resized to `target`; if one would exceed LONG views,
    of the part of the image around the view.

    The part begins and ends at multiples of `side`, which are multiples of `target` when resized: the pixels stay where
    they were, up to the fraction of a pixel by which `resized` was rounded.
    """
    sides, view = np.stack([heights, widths], 1).astype(np.int64), np.array(height_width(size))
    margin = np.maximum(1, -(-2 // side))  # a bicubic filter reaches two pixels of the coarser grid
    long = resized > LONG * view
    first = np.where(long, np.maximum(corner // target - margin, 0), 0)
    last = -(-(corner + view) // target) + margin
    to_the_end = ~long | (last * side >= sides)
    begin, end = first * side, np.where(to_the_end, sides, last * side)
    part = np.where(to_the_end, resized, last * target) - first * target
    return Geometry(np.concatenate([begin, end - begin], 1), part, corner - first * target)
