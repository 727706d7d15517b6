"""Batches for training and for evaluation, from an index of images; usable without the rest of fastdeit.

index = open_index("imagenet", "train")
loader = train_loader(index, batch_size=256, augmentation=Augmentation(aa="3aug"), device="cuda")
for epoch in range(300):
    loader.set_epoch(epoch)
    for images, labels, indices, mix in loader:
        x = mix_normalize(images, mean, std, **mix._asdict())       # fastdeit.kernels
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .augmentation import Augmentation
from .mixing import Mix
from .plan import UNLABELLED, EvaluationPlans, Plan, TrainPlans

AHEAD = 2  # batches in the making while one is used


class Batch(NamedTuple):
    """B samples. The memory is the batch's own: it stays as it is for as long as somebody holds it."""

    images: Tensor  # (B, size, size, 3) uint8 on the device
    labels: Tensor  # (B,) int64 on the device; UNLABELLED (-100) where there is no label
    indices: Tensor  # (B,) int64 on the CPU; position in the index, -1 for padding of the last evaluation batch
    mix: Mix | None  # None in evaluation


def train_loader(
    index,
    *,
    batch_size: int = 64,
    input_size: int = 224,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    num_threads: int | None = None,
) -> "Loader":
    """Shuffled, augmented batches with what to mix and to erase; the incomplete last batch is dropped.

    index: from open_index, open_folder or open_files
    batch_size: samples of this process in a step, even if mixup or cutmix is on
    input_size: height and width of the views
    augmentation: the DeiT recipe if None
    seed: in [0, 2**32). What a sample looks like is a function of (seed, epoch, its place in the index, its copy), how
        it is mixed one of (seed, epoch, step): neither depends on rank, world_size or num_threads. Pixels differ by a
        few levels between "cpu" and "cuda", which decode and resize with other libraries.
    num_threads: for decoding and augmenting; all cores if None

    Raises ValueError for an odd batch_size with mixing, or fewer images than one global batch.
    """
    augmentation = augmentation or Augmentation()
    plans = TrainPlans(
        index,
        batch_size=batch_size,
        size=input_size,
        augmentation=augmentation,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    return Loader(plans, device, num_threads, augmentation.fill)


def eval_loader(
    index,
    *,
    batch_size: int = 64,
    input_size: int = 224,
    crop_pct: float = 0.875,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    num_threads: int | None = None,
) -> "Loader":
    """Every image once over all ranks, in order: the shorter side resized to input_size / crop_pct, the centre cropped.

    All ranks take the same number of steps. What fills up the last batch has index -1 and label -100.
    """
    plans = EvaluationPlans(
        index, batch_size=batch_size, size=input_size, crop_pct=crop_pct, rank=rank, world_size=world_size
    )
    return Loader(plans, device, num_threads, (0, 0, 0))


class Loader:
    """Iterate it for the batches of the current epoch; `len` is their number.

    A resumed run calls set_epoch, then load_state_dict: the next iteration starts after the batches already given.
    """

    def __init__(self, plans: TrainPlans | EvaluationPlans, device, num_threads: int | None, fill):
        self.plans, self.index, self.device = plans, plans.index, torch.device(device)
        from .cpu import CpuViews  # loads DALI, which an index alone does not need

        num_threads = num_threads or len(os.sched_getaffinity(0))
        self.views = CpuViews(self.index, plans.batch_size, plans.size, num_threads, fill)
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="fastdeit-loader")
        self.in_flight: deque[Plan] = deque()  # submitted to self.views, not collected; touched by the worker alone
        self.start = self.position = 0

    def __len__(self) -> int:
        return self.plans.steps

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives, from its beginning."""
        self.worker.submit(self._abandon).result()
        self.plans.set_epoch(epoch)
        self.start = self.position = 0

    def state_dict(self) -> dict[str, int]:
        """How many batches of this epoch have been given."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if not 0 <= state["position"] <= len(self):
            raise ValueError(f"cannot go on after {state['position']} batches of an epoch of {len(self)}")
        self.start = self.position = state["position"]

    def __iter__(self) -> Iterator[Batch]:
        start, self.start = self.start, 0
        self.worker.submit(self._abandon).result()
        steps = iter(range(start, len(self)))
        made = deque(self.worker.submit(self._make, step) for step in islice(steps, AHEAD))
        for step in range(start, len(self)):
            batch = made.popleft().result()
            made.extend(self.worker.submit(self._make, later) for later in islice(steps, 1))
            self.position = step + 1
            yield batch

    def _abandon(self) -> None:
        """Drop what an iteration that was broken off has left behind."""
        while self.in_flight:
            self.views.collect(self.in_flight.popleft())

    def _make(self, step: int) -> Batch:
        while len(self.in_flight) < AHEAD:
            ahead = self.in_flight[-1].step + 1 if self.in_flight else step
            if ahead == len(self):
                break
            self.in_flight.append(self.plans[ahead])
            self.views.submit(self.in_flight[-1])
        plan = self.in_flight.popleft()
        assert plan.step == step, f"expected step {step}, got {plan.step}"
        return self._batch(plan, self.views.collect(plan))

    def _batch(self, plan: Plan, images: Tensor) -> Batch:
        labels = np.where(plan.counted, self.index.labels[plan.indices], UNLABELLED)
        indices = np.where(plan.counted, plan.indices, -1)
        mix = None
        if plan.lam is not None:
            mixing = (plan.partner, plan.lam, plan.box, plan.views.erase_box, plan.views.erase_seed)
            mix = Mix(*map(self._on_device, mixing))
        return Batch(images, self._on_device(labels), torch.from_numpy(indices), mix)

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array))
