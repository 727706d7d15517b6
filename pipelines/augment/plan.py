"""What each step of an epoch is made of: which images, which views of them, and how they mix. Decided, not yet done.

A plan is a pure function of (seed, epoch, step, rank): the loader may make it early, late, or again after a resume.
B is the batch size of one process, G = B * world_size the global batch.
"""

from dataclasses import dataclass

import numpy as np

from fastdeit.pipelines.bad_files import NoImages

from .augmentation import Augmentation, Views, draw_mix, draw_views
from .crop import evaluation_crop
from .draws import Draws, Purpose, integers
from .sampler import batch_slice, epoch_order, evaluation_order, steps_per_epoch

AT_ONCE = 1024  # samples drawn together: numpy's cost a call is spread over several small batches


@dataclass(frozen=True)
class Plan:
    """One batch of one process."""

    step: int
    indices: np.ndarray  # (B,) int64  which images to read
    copies: np.ndarray  # (B,) int64  repeated augmentation: which view of it in this epoch
    counted: np.ndarray  # (B,) bool  False for padding, whose image only fills the place
    views: Views
    partner: np.ndarray | None = None  # (B,) int64, None in evaluation, like the next two
    lam: np.ndarray | None = None  # (B,) float32
    box: np.ndarray | None = None  # (B, 4) int32


class TrainPlans:
    """The plans of training: shuffled, augmented, mixed; the incomplete last batch is dropped."""

    def __init__(
        self,
        index,
        *,
        batch_size: int,
        size: int,
        augmentation: Augmentation,
        seed: int,
        rank: int,
        world_size: int,
    ):
        if augmentation.mixes and batch_size % 2:
            raise ValueError(f"mixup and cutmix pair neighbours: batch_size must be even, got {batch_size}")
        self.index, self.batch_size, self.size, self.seed = index, batch_size, size, seed
        self.augmentation, self.rank, self.world_size = augmentation, rank, world_size
        self.steps = steps_per_epoch(len(index), batch_size, world_size)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.order = self.copies = None  # made when the first step asks: an epoch may be set and never run
        self.block, self.drawn = None, None

    def __getitem__(self, step: int) -> Plan:
        """The plan of one step; cheapest asked in rising order."""
        per_block = max(1, AT_ONCE // self.batch_size)
        block, row = divmod(step, per_block)
        if block != self.block:
            steps = range(block * per_block, min((block + 1) * per_block, self.steps))
            self.block, self.drawn = block, self._draw(steps)
        indices, copies, views, *mix = self.drawn
        rows = slice(row * self.batch_size, (row + 1) * self.batch_size)
        counted = np.ones(self.batch_size, bool)
        return Plan(step, indices[rows], copies[rows], counted, views[rows], *(part[rows] for part in mix))

    def _draw(self, steps: range) -> tuple:
        """Indices, copies, views, partner, lam and box of these steps, one after the other."""
        if self.order is None:
            self.order, self.copies = epoch_order(
                len(self.index),
                seed=self.seed,
                epoch=self.epoch,
                repeats=self.augmentation.repeats,
                global_batch=self.batch_size * self.world_size,
            )
        positions = np.concatenate(
            [np.r_[batch_slice(step, self.batch_size, self.rank, self.world_size)] for step in steps]
        )
        indices, copies = self.order[positions], self.copies[positions]
        return indices, copies, *self._draw_samples(np.array(steps), indices, copies)

    def _draw_samples(self, steps: np.ndarray, indices: np.ndarray, copies: np.ndarray) -> tuple:
        draws = Draws(self.seed, self.epoch, indices, copies)
        heights, widths = self.index.heights[indices], self.index.widths[indices]
        views = draw_views(self.augmentation, draws, heights, widths, self.size)
        return views, *draw_mix(self.augmentation, self.seed, self.epoch, steps, indices, copies, self.size)

    def without(self, plan: Plan, bad: set[int]) -> Plan:
        """The same plan with other images in the place of `bad` ones: drawn from the same random numbers, each keyed
        by the image it stands in for, so the same image is chosen wherever and whenever the bad one is met."""
        indices = plan.indices.copy()
        for row in np.flatnonzero(np.isin(indices, list(bad))):
            indices[row] = self._substitute(int(indices[row]), int(plan.copies[row]), bad)
        if np.array_equal(indices, plan.indices):
            return plan
        drawn = self._draw_samples(np.array([plan.step]), indices, plan.copies)
        return Plan(plan.step, indices, plan.copies, plan.counted, *drawn)

    def _substitute(self, index: int, copy: int, bad: set[int]) -> int:
        draws = Draws(self.seed, self.epoch, np.array([index]), np.array([copy]))
        for count in (8, 128, 2048):
            for choice in integers(draws.uniform(Purpose.REPLACE, count)[0], len(self.index)):
                if int(choice) not in bad:
                    return int(choice)
        raise ValueError(f"found no readable image among {len(self.index)} to take the place of a bad one")


class EvaluationPlans:
    """The plans of evaluation: every image once over all ranks, in order; the last batch is padded."""

    def __init__(self, index, *, batch_size: int, size: int, crop_pct: float, rank: int, world_size: int):
        if not 0 < crop_pct <= 1:
            raise ValueError(f"crop_pct is a share of the resized image and must be in (0, 1], got {crop_pct}")
        self.index, self.batch_size, self.size, self.crop_pct = index, batch_size, size, crop_pct
        self.rank, self.world_size = rank, world_size
        self.steps = steps_per_epoch(len(index), batch_size, world_size, drop_last=False)
        self.order = evaluation_order(len(index), batch_size, world_size)

    def set_epoch(self, epoch: int) -> None:
        """Evaluation is the same in every epoch."""

    def __getitem__(self, step: int) -> Plan:
        indices = self.order[batch_slice(step, self.batch_size, self.rank, self.world_size)]
        return self._plan(step, np.maximum(indices, 0), indices >= 0)

    def _plan(self, step: int, indices: np.ndarray, counted: np.ndarray) -> Plan:
        B, heights, widths = len(indices), self.index.heights[indices], self.index.widths[indices]
        views = Views(
            geometry=evaluation_crop(heights, widths, self.size, self.crop_pct),
            flip=np.zeros(B, bool),
            ops=np.zeros((B, 0), np.int32),
            args=np.zeros((B, 0), np.float32),
            erase_box=np.zeros((B, 4), np.int32),
            erase_seed=np.zeros(B, np.int64),
        )
        return Plan(step, indices, np.zeros(B, np.int64), counted, views)

    def without(self, plan: Plan, bad: set[int]) -> Plan:
        """The same plan with padding in the place of `bad` images: evaluation must not count another image twice."""
        is_bad = np.isin(plan.indices, list(bad))
        if not is_bad.any():
            return plan
        good = next((i for i in range(len(self.index)) if i not in bad), None)
        if good is None:
            raise NoImages("not one image of the index can be decoded")
        return self._plan(plan.step, np.where(is_bad, good, plan.indices), plan.counted & ~is_bad)
