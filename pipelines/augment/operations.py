"""The image operations of RandAugment, 3-Augment and colour jitter, and the meaning of their argument.

A view has a short sequence of (operation, argument), drawn on the host; decode/dali_operations.py and decode/cpu.py
(Pillow) apply it to uint8 images (height, width, 3). The reference is Pillow, called as timm's auto_augment.py does.
"""

from enum import IntEnum

import numpy as np


class Operation(IntEnum):
    """Each comment gives the meaning of the argument; - for none."""

    IDENTITY = 0  # -
    AUTO_CONTRAST = 1  # -
    EQUALIZE = 2  # -
    INVERT = 3  # -
    POSTERIZE = 4  # bits to keep of each value, 1 to 8
    SOLARIZE = 5  # values from here on are inverted, 0 to 256
    SOLARIZE_ADD = 6  # added to values below 128, 0 to 128
    COLOR = 7  # 0 is grey, 1 the image itself, above 1 more saturated
    CONTRAST = 8  # 0 is its mean grey, 1 the image itself
    BRIGHTNESS = 9  # 0 is black, 1 the image itself
    SHARPNESS = 10  # 0 is smoothed, 1 the image itself
    BLUR = 11  # standard deviation of a Gaussian, pixels
    ROTATE = 12  # degrees, counter-clockwise
    SHEAR_X = 13  # pixels to the left per row
    SHEAR_Y = 14  # pixels up per column
    TRANSLATE_X = 15  # to the left, fraction of the width
    TRANSLATE_Y = 16  # up, fraction of the height


GEOMETRIC = (Operation.ROTATE, Operation.SHEAR_X, Operation.SHEAR_Y, Operation.TRANSLATE_X, Operation.TRANSLATE_Y)


def affine_matrices(ops: np.ndarray, args: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(..., 2, 3) float32 for ops and args (...) on images of size (height, width): where in the source (x, y) each
    pixel of the result comes from, pixel centres at half integers as in Pillow. The identity for other operations."""
    rotate, shear_x, shear_y, move_x, move_y = (args.astype(np.float64) * (ops == op) for op in map(int, GEOMETRIC))
    angle = -np.radians(rotate)
    cos, sin, (height, width) = np.cos(angle), np.sin(angle), size
    y, x = height / 2, width / 2
    matrices = np.empty((*ops.shape, 2, 3), np.float32)
    matrices[..., 0, 0] = matrices[..., 1, 1] = cos
    matrices[..., 0, 1] = sin + shear_x
    matrices[..., 1, 0] = shear_y - sin
    matrices[..., 0, 2] = x - cos * x - sin * y + move_x * width
    matrices[..., 1, 2] = y + sin * x - cos * y + move_y * height
    return matrices
