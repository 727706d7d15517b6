"""Policies that draw the operations of a view: RandAugment, 3-Augment and colour jitter.

RandAugment (Cubuk et al., arXiv 1909.13719) as timm defines it (timm/data/auto_augment.py), from timm's string: each of
n layers picks one of 15 operations and applies it with probability p, at a magnitude drawn from a normal distribution
around m and clipped to [0, mmax]; signed operations change their direction with probability 1/2.

3-Augment and colour jitter of DeiT III (Touvron et al., arXiv 2204.07118; facebookresearch/deit, augment.py), which is
torchvision's ColorJitter without hue.
"""

import re
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from .draws import Draws, Purpose, integers
from .operations import Operation

OPERATIONS = (
    Operation.AUTO_CONTRAST,
    Operation.EQUALIZE,
    Operation.INVERT,
    Operation.ROTATE,
    Operation.POSTERIZE,
    Operation.SOLARIZE,
    Operation.SOLARIZE_ADD,
    Operation.COLOR,
    Operation.CONTRAST,
    Operation.BRIGHTNESS,
    Operation.SHARPNESS,
    Operation.SHEAR_X,
    Operation.SHEAR_Y,
    Operation.TRANSLATE_X,
    Operation.TRANSLATE_Y,
)
ENHANCERS = (Operation.COLOR, Operation.CONTRAST, Operation.BRIGHTNESS, Operation.SHARPNESS)


@dataclass(frozen=True)
class RandAugment:
    """timm's `rand-m9-n2-p0.5-mstd0.5-mmax10-inc1`; the defaults are those of timm's string."""

    magnitude: int = 10  # m
    layers: int = 2  # n
    probability: float = 0.5  # p, of each layer
    magnitude_std: float = 0.0  # mstd; above 100 the magnitude is uniform in [0, m]
    magnitude_max: int = 10  # mmax
    increasing: bool = False  # inc: posterize, solarize and the enhancers get stronger with the magnitude

    @classmethod
    def parse(cls, text: str) -> "RandAugment":
        """Raises ValueError for a string that does not follow timm's grammar (sections m, n, p, mstd, mmax, inc)."""
        name, *sections = text.split("-")
        keys = {
            "m": ("magnitude", int),
            "n": ("layers", int),
            "p": ("probability", float),
            "mstd": ("magnitude_std", float),
            "mmax": ("magnitude_max", int),
            "inc": ("increasing", lambda value: bool(int(value))),
        }
        fields = {}
        for section in sections:
            match = re.fullmatch(r"([a-z]+)([\d.]+)", section)
            if name != "rand" or match is None or match[1] not in keys:
                break
            field, convert = keys[match[1]]
            try:
                fields[field] = convert(match[2])
            except ValueError:
                break
        else:
            if name == "rand":
                return cls(**fields)
        raise ValueError(
            f"cannot read the RandAugment string {text!r}: expected rand followed by sections of m, n, p, mstd, mmax "
            "and inc with a number each, as in 'rand-m9-mstd0.5-inc1'"
        )

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Operations (B, layers) int32 and their arguments (B, layers) float32."""
        uniform = draws.uniform(Purpose.RAND_AUGMENT, 4 * self.layers).reshape(len(draws), self.layers, 4)
        chosen = np.array(OPERATIONS, np.int32)[integers(uniform[..., 0], len(OPERATIONS))]
        ops = np.where(uniform[..., 1] <= self.probability, chosen, Operation.IDENTITY).astype(np.int32)
        sign = np.where(uniform[..., 3] > 0.5, -1.0, 1.0)
        return ops, self.arguments(ops, self._magnitudes(uniform[..., 2]), sign)

    def _magnitudes(self, uniform: np.ndarray) -> np.ndarray:
        if self.magnitude_std > 100:
            magnitude = self.magnitude * uniform
        else:
            from scipy.special import ndtri

            magnitude = self.magnitude + self.magnitude_std * ndtri(uniform)
        return np.clip(magnitude, 0, self.magnitude_max)

    def arguments(self, ops: np.ndarray, magnitude: np.ndarray, sign: np.ndarray) -> np.ndarray:
        """timm's LEVEL_TO_ARG: the argument of each operation at its magnitude and sign; float32, of the same shape."""
        level = magnitude / 10
        bits, threshold = np.floor(level * 4), np.minimum(256, np.floor(level * 256))
        # With no bits left the image would be black, and Pillow 13 raises.
        posterize = np.maximum(1, 4 - bits if self.increasing else bits)
        solarize = 256 - threshold if self.increasing else threshold
        enhance = np.maximum(0.1, 1 + sign * level * 0.9) if self.increasing else level * 1.8 + 0.1
        args = np.zeros(ops.shape)
        for op, value in (
            (Operation.ROTATE, sign * level * 30),
            (Operation.POSTERIZE, posterize),
            (Operation.SOLARIZE, solarize),
            (Operation.SOLARIZE_ADD, np.minimum(128, np.floor(level * 110))),
            (Operation.SHEAR_X, sign * level * 0.3),
            (Operation.SHEAR_Y, sign * level * 0.3),
            (Operation.TRANSLATE_X, sign * level * 0.45),
            (Operation.TRANSLATE_Y, sign * level * 0.45),
            *((op, enhance) for op in ENHANCERS),
        ):
            args = np.where(ops == op, value, args)
        return args.astype(np.float32)


BLUR_RADIUS = (0.1, 2.0)  # pixels
JITTERED = (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR)
ORDERS = np.array(list(permutations(JITTERED)), np.int32)


def draw_three_augment(draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """One of grey, solarize (at 128) and blur, equally likely: operations (B, 1) int32, arguments (B, 1) float32."""
    choice, radius = draws.uniform(Purpose.THREE_AUGMENT, 2).T
    kind = integers(choice, 3)
    ops = np.array([Operation.COLOR, Operation.SOLARIZE, Operation.BLUR], np.int32)[kind]
    blur = BLUR_RADIUS[0] + (BLUR_RADIUS[1] - BLUR_RADIUS[0]) * radius
    args = np.choose(kind, [np.zeros(len(draws)), np.full(len(draws), 128.0), blur])
    return ops[:, None], args[:, None].astype(np.float32)


def draw_color_jitter(draws: Draws, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Brightness, contrast and saturation in random order, each by a factor uniform in 1 +- strength (not below 0):
    operations (B, 3) int32, arguments (B, 3) float32."""
    uniform = draws.uniform(Purpose.COLOR_JITTER, 4)
    low, high = max(0.0, 1 - strength), 1 + strength
    ops = ORDERS[integers(uniform[:, 0], len(ORDERS))]
    return ops, (low + (high - low) * uniform[:, 1:]).astype(np.float32)
