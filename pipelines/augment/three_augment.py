"""3-Augment and colour jitter: the augmentation of DeiT III (Touvron et al., arXiv 2204.07118; facebookresearch/deit,
augment.py), and torchvision's ColorJitter without hue."""

from itertools import permutations

import numpy as np

from .draws import Draws, Purpose, integers
from .operations import Operation

BLUR_RADIUS = (0.1, 2.0)  # pixels
JITTERED = (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR)
ORDERS = np.array(list(permutations(JITTERED)), np.int32)


def draw_three_augment(draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """One of grey, solarize (at 128) and blur, each as likely: operations (B, 1) int32, arguments (B, 1) float32."""
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
