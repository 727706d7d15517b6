"""Images that are in memory already, as evaluation sees files: the same crop and resize, on the CPU.

in    Pillow images; NumPy arrays (height, width[, channels]); PyTorch tensors ([channels,] height, width)
out   (height, width, 3) uint8
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdeit.pipelines.augment.crop import Size, evaluation_crop

from .cpu import resized_view


def evaluation_view(image: object, size: Size, crop_pct: float) -> Tensor:
    """The view of `image` that eval_loader gives of a file with these pixels, bit by bit what it gives on a CPU:
    resized to cover size / crop_pct, then a centre crop. (height, width, 3) uint8.

    Raises ValueError for what is no image.
    """
    pixels_HWC = as_pixels(image)
    height, width = pixels_HWC.shape[:2]
    geometry = evaluation_crop(np.array([height]), np.array([width]), size, crop_pct)
    (window,), (resized,), (corner,) = (part.tolist() for part in geometry)
    top, left, rows, columns = window
    return resized_view(pixels_HWC[top : top + rows, left : left + columns], resized, corner, size)


def as_pixels(image: object) -> Tensor:
    """(height, width, 3) uint8. Integers are taken from 0 to 255, floats from 0 to 1; grey becomes three equal
    channels, and a fourth channel is left out. Raises ValueError for anything else."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image.convert("RGB")))
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
        pixels = pixels if pixels.ndim != 3 else pixels.permute(1, 2, 0)
    elif isinstance(image, np.ndarray):
        pixels = torch.from_numpy(np.array(image))
    else:
        raise ValueError(f"a {type(image).__name__} is no image: give a path, a Pillow image, an array or a tensor")
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    shape = tuple(image.shape)
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        form = "([3,] height, width)" if isinstance(image, Tensor) else "(height, width[, 3])"
        raise ValueError(f"a {type(image).__name__} of shape {shape} is no image: expected {form}")
    pixels = _as_uint8(pixels)
    return pixels.expand(-1, -1, 3) if pixels.shape[2] == 1 else pixels[..., :3]


def _as_uint8(pixels: Tensor) -> Tensor:
    if pixels.dtype == torch.uint8:
        return pixels
    low, high = float(pixels.min()), float(pixels.max())
    limit = 1.0 if pixels.is_floating_point() else 255
    if not (low >= 0 and high <= limit):
        raise ValueError(
            f"an image of {str(pixels.dtype).removeprefix('torch.')} has values from {low:g} to {high:g}: expected "
            f"0 to {limit:g}, before any normalisation"
        )
    return (pixels.float() * (255 / limit)).round().to(torch.uint8)
