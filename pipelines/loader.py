"""Batches for training and evaluation from an index of images; usable without the rest of fastdeit.

    index = open_index("imagenet", "train")
    loader = train_loader(index, batch_size=256, augmentation=Augmentation(aa="3aug"), device="cuda")
    for epoch in range(300):
        loader.set_epoch(epoch)
        for images, labels, indices, mix in loader:
            x = mix_normalize(images, mean, std, **mix._asdict())       # fastdeit.kernels

The last station of a batch:

    in    (Plan, images) of each step, from decode/prefetch.py, and the labels of the index
    out   Batch: images (B, height, width, 3) uint8, labels (B,) int64, indices (B,) int64, Mix or None
"""

import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .augment.augmentation import Augmentation
from .augment.crop import Size, height_width
from .augment.plan import EvaluationPlans, Plan, TrainPlans
from .bad_files import BadFiles
from .decode import Decoding
from .decode.prefetch import PREFETCH, Decoder, Prefetcher
from .index.combined import Repeated, WithUnlabelled
from .index.image_index import Index
from .index.labels import UNLABELLED
from .synthetic import SyntheticDecoder, SyntheticIndex

log = logging.getLogger(__name__)

AnyIndex = Index | SyntheticIndex | WithUnlabelled | Repeated


class Mix(NamedTuple):
    """What to mix and erase in a batch of B samples; all tensors on the batch's device."""

    partner: Tensor  # (B,) int64    position in this batch of the sample mixed in (itself where nothing is mixed)
    lam: Tensor  # (B,) float32      weight of the sample's own label: 1 where nothing is mixed, the area for cutmix
    box: Tensor  # (B, 4) int32      cutmix box, taken from the partner; all 0 means mixup
    erase_box: Tensor  # (B, 4) int32  rectangle to erase; all 0 for none
    erase_seed: Tensor  # (B,) int64  key of the erased pixels' noise, in [0, 2**62)


class Batch(NamedTuple):
    """B samples. Owns its memory: no later batch overwrites it."""

    images: Tensor  # (B, height, width, 3) uint8 on the device
    labels: Tensor  # (B,) int64 on the device; UNLABELLED (-100) where there is no label
    indices: Tensor  # (B,) int64 on the CPU; position in the index, -1 for the padding of an evaluation batch
    mix: Mix | None  # None in evaluation


def batch_of(plan: Plan, images: Tensor, index_labels: np.ndarray) -> Batch:
    """The images of a plan with their labels and what to mix, all on the images' device (indices on the CPU)."""
    labels = np.where(plan.counted, index_labels[plan.indices], UNLABELLED)
    indices = torch.from_numpy(np.where(plan.counted, plan.indices, -1))
    if plan.partner is None or plan.lam is None or plan.box is None:
        (moved,) = on_device([labels], images.device)
        return Batch(images, moved, indices, None)
    mixing = [plan.partner, plan.lam, plan.box, plan.views.erase_box, plan.views.erase_seed]
    moved, *mix = on_device([labels, *mixing], images.device)
    return Batch(images, moved, indices, Mix(*mix))


def on_device(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on the device; to a GPU in one asynchronous copy from pinned memory."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    starts = np.cumsum([0, *(-(-array.nbytes // 16) * 16 for array in arrays)]).tolist()
    block = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    for array, start in zip(arrays, starts):
        block.numpy()[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    block = block.to(device, non_blocking=True)
    return [
        block[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for array, start in zip(arrays, starts)
    ]


def train_loader(
    index: AnyIndex,
    *,
    batch_size: int = 64,
    input_size: Size = 224,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    num_threads: int | None = None,
    bad_files: BadFiles | None = None,
    decoding: Decoding | None = None,
) -> "Loader":
    """Shuffled and augmented batches, with what to mix and erase; the incomplete last batch is dropped.

    index: from open_index, open_folder or open_files, or SyntheticIndex() to measure without a data pipeline
    batch_size: samples of this process in a step; even if mixup or cutmix is on
    input_size: (height, width) of the views, or one number for squares
    augmentation: the DeiT recipe if None
    seed: in [0, 2**32). The view of a sample is a function of (seed, epoch, position in the index, copy), its mixing
        one of (seed, epoch, step): neither depends on rank, world_size or num_threads. "cpu" and "cuda" draw the same
        views; their pixels differ by a few levels, because different libraries decode and resize.
    num_threads: for decoding and augmenting; all cores if None
    bad_files: counts images that cannot be decoded and raises when there are too many; BadFiles.of(index) if None.
        They are replaced by other images, chosen with the same counter-based random numbers.
    decoding: how a GPU decodes; the fastest way that decode/probe.py finds to be right if None

    Raises ValueError for an odd batch_size with mixing, or fewer images than one global batch.
    """
    augmentation = augmentation or Augmentation()
    plans = TrainPlans(
        index,
        batch_size=batch_size,
        size=height_width(input_size),
        augmentation=augmentation,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    return Loader(plans, device, num_threads, bad_files, augmentation, decoding)


def eval_loader(
    index: AnyIndex,
    *,
    batch_size: int = 64,
    input_size: Size = 224,
    crop_pct: float = 0.875,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    num_threads: int | None = None,
    bad_files: BadFiles | None = None,
    decoding: Decoding | None = None,
) -> "Loader":
    """Every image once over all ranks, in order: resized to cover input_size / crop_pct (of a square: by the shorter
    side), then a centre crop.

    All ranks take the same number of steps. Padding of the last batch, and the replacement of an image that cannot be
    decoded, have index -1 and label -100.
    """
    plans = EvaluationPlans(
        index, batch_size=batch_size, size=height_width(input_size), crop_pct=crop_pct, rank=rank, world_size=world_size
    )
    return Loader(plans, device, num_threads, bad_files, None, decoding)


class Loader:
    """Iterates over the batches of the current epoch; `len` is their number. One iterator at a time.

    To resume, call set_epoch, then load_state_dict: the next iteration starts after the batches already returned.
    """

    def __init__(
        self,
        plans: TrainPlans | EvaluationPlans,
        device: str | torch.device,
        num_threads: int | None,
        bad_files: BadFiles | None,
        augmentation: Augmentation | None,
        decoding: Decoding | None = None,
    ):
        self.plans, self.index, self.device = plans, plans.index, torch.device(device)
        self.bad_files = bad_files if bad_files is not None else BadFiles.of(self.index)
        decoder = self._decoder(num_threads or _usable_cores(), augmentation, decoding)
        self.prefetcher = Prefetcher(plans, decoder, self.bad_files)
        # On a GPU DALI decodes ahead in its own threads and streams, and a batch must be handed over on the stream that
        # uses it. On the CPU part of the work is in Python: a thread does it ahead.
        self.worker = (
            None if self.device.type == "cuda" else ThreadPoolExecutor(1, thread_name_prefix="fastdeit-loader")
        )
        self.start = self.position = 0

    def _decoder(self, num_threads: int, augmentation: Augmentation | None, decoding: Decoding | None) -> Decoder:
        if isinstance(self.index, SyntheticIndex):
            return SyntheticDecoder(self.plans.batch_size, self.plans.size, self.device)
        shared = (self.index, self.plans.batch_size, self.plans.size, num_threads)
        if self.device.type == "cuda":
            from .decode.gpu import GpuDecoder

            if decoding is None:
                decoding = self._trusted_decoding(num_threads)
            return GpuDecoder(*shared, self.device, augmentation, decoding)
        from .decode.cpu import CpuDecoder

        return CpuDecoder(*shared, augmentation.fill if augmentation else (0, 0, 0))

    def _trusted_decoding(self, num_threads: int) -> Decoding:
        from .decode.probe import trusted

        number = self.device.index if self.device.index is not None else torch.cuda.current_device()
        choice = trusted(self.index, number, num_threads)
        if choice.sentence:
            log.warning(choice.sentence)
        return choice.decoding

    def __len__(self) -> int:
        return self.plans.steps

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration, which starts at its first batch."""
        self._reset()
        self.plans.set_epoch(epoch)
        self.start = self.position = 0

    def state_dict(self) -> dict[str, int]:
        """The number of batches of this epoch returned so far."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if not 0 <= state["position"] <= len(self):
            raise ValueError(f"cannot resume after {state['position']} batches of an epoch of {len(self)}")
        self.start = self.position = state["position"]

    def __iter__(self) -> Iterator[Batch]:
        start, self.start = self.start, 0
        self._reset()
        steps = range(start, len(self))
        for batch in map(self._batch, steps) if self.worker is None else self._prefetched(iter(steps), self.worker):
            start += 1
            self.position = start
            yield batch

    def _prefetched(self, steps: Iterator[int], worker: Executor) -> Iterator[Batch]:
        pending = deque(worker.submit(self._batch, step) for step in islice(steps, PREFETCH))
        while pending:
            batch = pending.popleft().result()
            pending.extend(worker.submit(self._batch, step) for step in islice(steps, 1))
            yield batch

    def _batch(self, step: int) -> Batch:
        plan, images = self.prefetcher.get(step)
        return batch_of(plan, images, self.index.labels)

    def _reset(self) -> None:
        """Discard what an unfinished iteration left in flight."""
        if self.worker is None:
            self.prefetcher.reset()
        else:
            self.worker.submit(self.prefetcher.reset).result()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
