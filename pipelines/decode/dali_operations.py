"""The operations of augment/operations.py as DALI graphs, for views made on a GPU (in tests, on the CPU).

Images are uint8 HWC, `arg` is a float32 scalar a sample. Compared with Pillow at the same argument: exact for invert,
posterize, solarize, solarize_add, color, contrast and brightness; for sharpness except on the border of one pixel,
which Pillow does not filter; within one level for auto_contrast and equalize. The geometric operations interpolate
linearly, because DALI has no cubic warp; blur is a true Gaussian, where Pillow repeats a box blur three times. The
tests state the bounds.
"""

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
from nvidia.dali import math

from fastdeit.pipelines.augment.operations import GEOMETRIC, Operation

LUMA = np.array([19595, 38470, 7471], np.float32) / 65536  # Pillow's convert("L")
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's ImageFilter.SMOOTH


def floats(image):
    return fn.cast(image, dtype=types.FLOAT)


def truncated(image):
    """To uint8 as in Pillow: clipped, then truncated."""
    return fn.cast(math.floor(math.clamp(image, 0.0, 255.0)), dtype=types.UINT8)


def blend(degenerate, image, factor):
    """Pillow's Image.blend: 0 gives `degenerate`, 1 the image, larger factors extrapolate."""
    return truncated(degenerate + factor * (floats(image) - degenerate))


def grey(image):
    """(H, W, 1) float, integer values."""
    luma = fn.reductions.sum(floats(image) * types.Constant(LUMA), axis_names="C", keep_dims=True)
    return math.floor(luma + 0.5)


def auto_contrast(image, arg):
    low = floats(fn.reductions.min(image, axis_names="HW", keep_dims=True))
    high = floats(fn.reductions.max(image, axis_names="HW", keep_dims=True))
    flat = fn.cast(high <= low, dtype=types.FLOAT)  # a constant channel is left unchanged
    stretched = (floats(image) - low) * (255.0 / (high - low + flat))
    # Pillow computes in double precision: without the 1e-4 an integer result may be truncated to the one below.
    return truncated(flat * floats(image) + (1.0 - flat) * stretched + 1e-4)


def invert(image, arg):
    return types.Constant(255, dtype=types.UINT8) - image


def equalize(image, arg):
    # DALI counts pixels up to and including a value, Pillow those below it: the same after inversion.
    return invert(fn.equalize(invert(image, arg)), arg)


def posterize(image, arg):
    step = math.pow(2.0, 8.0 - arg)
    return truncated(math.floor(floats(image) / step) * step)


def solarize(image, arg):
    x = floats(image)
    inverted = fn.cast(x >= arg, dtype=types.FLOAT)
    return truncated(x + inverted * (255.0 - 2.0 * x))


def solarize_add(image, arg):
    x = floats(image)
    return truncated(x + fn.cast(x < 128.0, dtype=types.FLOAT) * arg)


def color(image, arg):
    return blend(grey(image), image, arg)


def contrast(image, arg):
    mean = math.floor(fn.reductions.mean(grey(image), axis_names="HWC", keep_dims=True) + 0.5)
    return blend(mean, image, arg)


def brightness(image, arg):
    return truncated(arg * floats(image))


def sharpness(image, arg):
    smooth = math.floor(fn.filter(floats(image), types.Constant(SMOOTH), dtype=types.FLOAT) + 0.5)
    return blend(smooth, image, arg)


def blur(image, sigma):
    return fn.gaussian_blur(image, sigma=sigma)


def affine(image, matrix, fill):
    """matrix: operations.affine_matrices. DALI fills with one value for all channels, so `fill` is subtracted first."""
    shift = types.Constant(np.array(fill, np.float32))
    moved = fn.warp_affine(floats(image) - shift, matrix=matrix, fill_value=0.0, interp_type=types.INTERP_LINEAR)
    return fn.cast(math.clamp(moved + shift, 0.0, 255.0), dtype=types.UINT8)  # the cast rounds


COLOUR = {
    Operation.AUTO_CONTRAST: auto_contrast,
    Operation.EQUALIZE: equalize,
    Operation.INVERT: invert,
    Operation.POSTERIZE: posterize,
    Operation.SOLARIZE: solarize,
    Operation.SOLARIZE_ADD: solarize_add,
    Operation.COLOR: color,
    Operation.CONTRAST: contrast,
    Operation.BRIGHTNESS: brightness,
    Operation.SHARPNESS: sharpness,
}


def layer(image, op, arg, matrix, possible, fill):
    """One operation a sample: `op` (scalar Operation) selects among the `possible` ones; the five geometric operations
    share a branch and differ in their matrix. `op`, `arg` and `matrix` are on the CPU wherever the images are: DALI
    wants its operators' arguments there, and copies operands to the images' device."""
    branches = sorted({Operation.ROTATE if o in GEOMETRIC else o for o in possible})
    return _select(image, op, arg, matrix, branches, fill)


def _select(image, op, arg, matrix, branches, fill):
    # A binary search for the branch: a sample passes log2(len(branches)) splits instead of len(branches).
    if len(branches) == 1:
        return _apply(image, arg, matrix, branches[0], fill)
    middle = len(branches) // 2
    if op < int(branches[middle]):
        image = _select(image, op, arg, matrix, branches[:middle], fill)
    else:
        image = _select(image, op, arg, matrix, branches[middle:], fill)
    return image


def _apply(image, arg, matrix, operation, fill):
    if operation == Operation.IDENTITY:
        return image
    if operation == Operation.ROTATE:
        return affine(image, matrix, fill)
    if operation == Operation.BLUR:
        return blur(image, arg)
    return COLOUR[operation](image, arg)
