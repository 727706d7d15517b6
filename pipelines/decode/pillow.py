"""The operations in Pillow, which defines them: the same calls as timm's auto_augment.py and torchvision's ColorJitter
make, with bicubic resampling."""

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from fastdeit.pipelines.augment.operations import GEOMETRIC, Operation, affine_matrices


def _affine(image: Image.Image, op: int, arg: float, fill: tuple[int, int, int]) -> Image.Image:
    matrix = affine_matrices(np.array(op), np.array(arg), image.width).ravel().tolist()
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill)


def _solarize_add(image: Image.Image, add: float) -> Image.Image:
    table = [min(255, value + int(add)) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


OPERATIONS = {
    Operation.AUTO_CONTRAST: lambda image, arg: ImageOps.autocontrast(image),
    Operation.EQUALIZE: lambda image, arg: ImageOps.equalize(image),
    Operation.INVERT: lambda image, arg: ImageOps.invert(image),
    Operation.POSTERIZE: lambda image, arg: image if arg >= 8 else ImageOps.posterize(image, int(arg)),
    Operation.SOLARIZE: lambda image, arg: ImageOps.solarize(image, int(arg)),
    Operation.SOLARIZE_ADD: _solarize_add,
    Operation.COLOR: lambda image, arg: ImageEnhance.Color(image).enhance(arg),
    Operation.CONTRAST: lambda image, arg: ImageEnhance.Contrast(image).enhance(arg),
    Operation.BRIGHTNESS: lambda image, arg: ImageEnhance.Brightness(image).enhance(arg),
    Operation.SHARPNESS: lambda image, arg: ImageEnhance.Sharpness(image).enhance(arg),
    Operation.BLUR: lambda image, arg: image.filter(ImageFilter.GaussianBlur(arg)),
}


def apply(pixels_HWC: np.ndarray, ops: list[int], args: list[float], fill: tuple[int, int, int]) -> np.ndarray:
    """A square uint8 image after `ops` with `args`, one after the other; a new array."""
    image = Image.fromarray(pixels_HWC)
    for op, arg in zip(ops, args):
        if op in GEOMETRIC:
            image = _affine(image, op, arg, fill)
        elif op != Operation.IDENTITY:
            image = OPERATIONS[op](image, arg)
    return np.asarray(image)
