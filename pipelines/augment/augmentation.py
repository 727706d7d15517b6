"""Settings of the training views, named as the flags of timm and facebookresearch/deit, and the views they draw.

The operations are timm's; the draws are made here because those of timm, torchvision and DALI come from a generator's
state, so that a view would depend on the batch and on the worker (draws.py).
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .auto_augment import JITTERED, OPERATIONS, RandAugment, draw_color_jitter, draw_three_augment
from .crop import Geometry, Size, random_resized_crop, simple_random_crop
from .draws import Draws, Purpose
from .mixing import MODES, draw_erasing, draw_mixing, mixing_rows, spread_over_batch
from .operations import Operation


@dataclass(frozen=True)
class Augmentation:
    """The DeiT recipe by default. Raises ValueError for settings out of range."""

    scale: tuple[float, float] = (0.08, 1.0)  # area of a crop as a fraction of the image
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of a crop
    src: bool = False  # DeiT III's simple random crop instead of the random resized one
    hflip: float = 0.5
    aa: str = "rand-m9-mstd0.5-inc1"  # "none", "rand-..." in timm's grammar, or "3aug" (DeiT III)
    magnitudes: tuple[tuple[int, int], ...] = ()  # (epoch, RandAugment's m from there on), ascending; none: as in aa
    color_jitter: float = 0.3  # with 3aug or no aa (as in timm, RandAugment turns it off)
    reprob: float = 0.25  # probability of erasing a rectangle
    mixup: float = 0.8  # alpha, 0 for none
    cutmix: float = 1.0  # alpha, 0 for none
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5  # probability of cutmix where both are on
    mixup_mode: str = "batch"  # one lambda per "batch", "pair" or "elem"(ent)
    repeats: int = 3  # repeated augmentation: copies of an image in an epoch
    class_balance: float = 0.0  # 0: images as they come, 1: every class as often as any other (balance.py)
    fill: tuple[int, int, int] = (124, 116, 104)  # of pixels from outside the image: ImageNet's mean colour

    def __post_init__(self) -> None:
        for name in ("hflip", "reprob", "mixup_prob", "mixup_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability and must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.class_balance <= 1:
            raise ValueError(f"class_balance must be in [0, 1], got {self.class_balance}")
        for name in ("color_jitter", "mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative (0 turns it off), got {getattr(self, name)}")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "scale" and high > 1):
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high, got {getattr(self, name)}")
        if self.mixup_mode not in MODES:
            raise ValueError(f"mixup_mode must be one of {', '.join(MODES)}, got {self.mixup_mode!r}")
        if self.aa not in ("none", "3aug"):
            _ = self.rand_augment  # raises for a string that cannot be read
        elif self.magnitudes:
            raise ValueError(f"magnitudes are RandAugment's, and aa is {self.aa!r}: give rand-m9-mstd0.5-inc1, say")

    @property
    def mixes(self) -> bool:
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    @cached_property
    def rand_augment(self) -> RandAugment | None:
        return None if self.aa in ("none", "3aug") else RandAugment.parse(self.aa)

    def rand_augment_in(self, epoch: int) -> RandAugment | None:
        """With the magnitude that it has in an epoch."""
        magnitudes = [magnitude for first, magnitude in self.magnitudes if first <= epoch]
        if self.rand_augment is None or not magnitudes:
            return self.rand_augment
        return replace(self.rand_augment, magnitude=magnitudes[-1])

    @cached_property
    def layers(self) -> tuple[frozenset[Operation], ...]:
        """The operations that each layer may have."""
        if self.rand_augment is not None:
            return (frozenset(OPERATIONS) | {Operation.IDENTITY},) * self.rand_augment.layers
        three = (frozenset({Operation.COLOR, Operation.SOLARIZE, Operation.BLUR}),) if self.aa == "3aug" else ()
        return three + (frozenset(JITTERED),) * (3 if self.color_jitter > 0 else 0)


@dataclass(frozen=True)
class Views:
    """What to make of B images, one row a view."""

    geometry: Geometry
    flip: np.ndarray  # (B,) bool
    ops: np.ndarray  # (B, layers) int32  Operation
    args: np.ndarray  # (B, layers) float32
    erase_box: np.ndarray  # (B, 4) int32  y0, x0, y1, x1
    erase_seed: np.ndarray  # (B,) int64

    def __getitem__(self, rows: slice) -> "Views":
        geometry = Geometry(*(field[rows] for field in self.geometry))
        return Views(
            geometry, self.flip[rows], self.ops[rows], self.args[rows], self.erase_box[rows], self.erase_seed[rows]
        )


def draw_views(a: Augmentation, draws: Draws, heights: np.ndarray, widths: np.ndarray, size: Size) -> Views:
    """Views of `size` of the samples in `draws`, whose images have these heights and widths (B,)."""
    if a.src:
        geometry = simple_random_crop(draws, heights, widths, size)
    else:
        geometry = random_resized_crop(draws, heights, widths, size, a.scale, a.ratio)
    flip = draws.uniform(Purpose.FLIP, 1)[:, 0] < a.hflip if a.hflip > 0 else np.zeros(len(draws), bool)
    if a.reprob > 0:
        erase_box, erase_seed = draw_erasing(draws, a.reprob, size)
    else:
        erase_box, erase_seed = np.zeros((len(draws), 4), np.int32), np.zeros(len(draws), np.int64)
    return Views(geometry, flip, *_draw_operations(a, draws), erase_box, erase_seed)


def _draw_operations(a: Augmentation, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    if (rand_augment := a.rand_augment_in(draws.epoch)) is not None:
        return rand_augment.draw(draws)
    parts = [(np.zeros((len(draws), 0), np.int32), np.zeros((len(draws), 0), np.float32))]
    if a.aa == "3aug":
        parts.append(draw_three_augment(draws))
    if a.color_jitter > 0:
        parts.append(draw_color_jitter(draws, a.color_jitter))
    ops, args = zip(*parts)
    return np.concatenate(ops, 1), np.concatenate(args, 1)


def draw_mix(
    a: Augmentation, seed: int, epoch: int, steps: np.ndarray, indices: np.ndarray, copies: np.ndarray, size: Size
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How the N samples of the batches of `steps`, concatenated, are mixed: partner (N,) int64, a position in the
    sample's own batch, lam (N,) float32, box (N, 4) int32."""
    N = len(indices)
    if not a.mixes:
        return np.arange(N) % (N // len(steps)), np.ones(N, np.float32), np.zeros((N, 4), np.int32)
    lam, box = draw_mixing(
        mixing_rows(a.mixup_mode, seed, epoch, steps, indices, copies),
        size=size,
        mixup=a.mixup,
        cutmix=a.cutmix,
        probability=a.mixup_prob,
        switch_probability=a.mixup_switch_prob,
    )
    return spread_over_batch(a.mixup_mode, lam, box, N // len(steps))
