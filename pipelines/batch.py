"""What the loaders hand over."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .mixing import Mix
from .plan import UNLABELLED, Plan


class Batch(NamedTuple):
    """B samples. The memory is the batch's own: it stays as it is for as long as somebody holds it."""

    images: Tensor  # (B, size, size, 3) uint8 on the device
    labels: Tensor  # (B,) int64 on the device; UNLABELLED (-100) where there is no label
    indices: Tensor  # (B,) int64 on the CPU; position in the index, -1 for what fills up an evaluation batch
    mix: Mix | None  # None in evaluation


def batch_of(plan: Plan, images: Tensor, index_labels: np.ndarray) -> Batch:
    """The plan as it was carried out, with its images; the rest goes to the images' device."""
    labels = np.where(plan.counted, index_labels[plan.indices], UNLABELLED)
    indices = torch.from_numpy(np.where(plan.counted, plan.indices, -1))
    if plan.lam is None:
        (labels,) = on_device([labels], images.device)
        return Batch(images, labels, indices, None)
    mixing = [plan.partner, plan.lam, plan.box, plan.views.erase_box, plan.views.erase_seed]
    labels, *mixing = on_device([labels, *mixing], images.device)
    return Batch(images, labels, indices, Mix(*mixing))


def on_device(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on the device. To a GPU they travel as one block of pinned memory, without waiting."""
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
