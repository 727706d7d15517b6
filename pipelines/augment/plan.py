"""The plan of a step: which images, which views of them, how they are mixed; decided before anything is decoded.

    in    the order of the epoch (sampler.py), heights and widths of the images, the Augmentation
    out   Plan: for the B samples of this rank, indices (B,) int64, Views, and what to mix

A plan is a pure function of (seed, epoch, step, rank): it can be made early, late, or again after a resume.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from fastdeit.pipelines.bad_files import NoImages

from .augmentation import Augmentation, Views, draw_mix, draw_views
from .crop import evaluation_crop
from .draws import Draws, Purpose, integers
from .sampler import batch_slice, epoch_order, evaluation_order, steps_per_epoch

BLOCK = 1024  # samples drawn together, which spreads the cost of NumPy's calls over several small batches


@dataclass(frozen=True)
class Plan:
    """One batch of one process."""

    step: int
    indices: np.ndarray  # (B,) int64  positions in the index
    copies: np.ndarray  # (B,) int64  repeated augmentation: which copy of the image this is
    counted: np.ndarray  # (B,) bool  False for padding
    views: Views
    partner: np.ndarray | None = None  # (B,) int64, None in evaluation, like the next two
    lam: np.ndarray | None = None  # (B,) float32
    box: np.ndarray | None = None  # (B, 4) int32


class TrainPlans:
    """Plans of training: shuffled, augmented, mixed; the incomplete last batch is dropped."""

    def __init__(
        self,
        index,
        *,
        batch_size: int,
        size: tuple[int, int],
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
        self.orders: dict[int, Future] = {}  # by epoch, made for its first step: an epoch may be set and never run
        self.orderer = ThreadPoolExecutor(1, thread_name_prefix="fastdeit-order")
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.orders = {epoch: self.orders[epoch]} if epoch in self.orders else {}
        self.block, self.drawn = None, None

    def __getitem__(self, step: int) -> Plan:
        """The plan of one step; cheapest in ascending order."""
        per_block = max(1, BLOCK // self.batch_size)
        block, row = divmod(step, per_block)
        if block != self.block:
            steps = range(block * per_block, min((block + 1) * per_block, self.steps))
            self.block, self.drawn = block, self._draw(steps)
        indices, copies, views, *mix = self.drawn
        rows = slice(row * self.batch_size, (row + 1) * self.batch_size)
        counted = np.ones(self.batch_size, bool)
        return Plan(step, indices[rows], copies[rows], counted, views[rows], *(part[rows] for part in mix))

    def _draw(self, steps: range) -> tuple:
        """Indices, copies, views, partner, lam and box of these steps, concatenated."""
        order, copies = self._order(self.epoch).result()
        if 2 * steps.stop > self.steps:  # most of a second for a million images, which this epoch has time for
            self._order(self.epoch + 1)
        positions = np.concatenate(
            [np.r_[batch_slice(step, self.batch_size, self.rank, self.world_size)] for step in steps]
        )
        indices, copies = order[positions], copies[positions]
        return indices, copies, *self._draw_samples(np.array(steps), indices, copies)

    def _order(self, epoch: int) -> "Future[tuple[np.ndarray, np.ndarray]]":
        if epoch not in self.orders:
            self.orders[epoch] = self.orderer.submit(
                epoch_order, len(self.index), seed=self.seed, epoch=epoch, repeats=self.augmentation.repeats,
                global_batch=self.batch_size * self.world_size,
                labels=self.index.labels,
                class_balance=self.augmentation.class_balance,
            )  # fmt: skip
        return self.orders[epoch]

    def _draw_samples(self, steps: np.ndarray, indices: np.ndarray, copies: np.ndarray) -> tuple:
        draws = Draws(self.seed, self.epoch, indices, copies)
        heights, widths = self.index.heights[indices], self.index.widths[indices]
        views = draw_views(self.augmentation, draws, heights, widths, self.size)
        return views, *draw_mix(self.augmentation, self.seed, self.epoch, steps, indices, copies, self.size)

    def without(self, plan: Plan, bad: set[int]) -> Plan:
        """The plan with `bad` images replaced. The replacement is drawn with the bad image's own random numbers, so
        it is the same in any batch, on any rank, and after a resume."""
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
        raise ValueError(f"found no readable image among {len(self.index)} to replace a bad one")


class EvaluationPlans:
    """Plans of evaluation: every image once over all ranks, in order; the last batch is padded."""

    def __init__(self, index, *, batch_size: int, size: tuple[int, int], crop_pct: float, rank: int, world_size: int):
        if not 0 < crop_pct <= 1:
            raise ValueError(f"crop_pct is a fraction of the resized image and must be in (0, 1], got {crop_pct}")
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
        """The plan with padding instead of `bad` images: a replacement would count twice in the metrics."""
        is_bad = np.isin(plan.indices, list(bad))
        if not is_bad.any():
            return plan
        good = next((i for i in range(len(self.index)) if i not in bad), None)
        if good is None:
            raise NoImages("not one image of the index can be decoded")
        return self._plan(plan.step, np.where(is_bad, good, plan.indices), plan.counted & ~is_bad)
