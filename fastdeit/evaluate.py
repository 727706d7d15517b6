"""Accuracy of each head on labelled images.

    python -m fastdeit.evaluate CHECKPOINT --data-path DIR
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .command import UserError, need, run
from .student import heads

HEADS = ("cls", "dist", "both")


@torch.inference_mode()
def accuracy(model: nn.Module, loader, prepare: Callable, place, autocast: Callable = nullcontext) -> dict[str, dict]:
    """{"cls": {"top1": share, "top5": share, "loss": mean cross entropy}, ...} over all processes' images.

    A student with a distillation token has three entries: class head, distillation head, and "both": the average of
    the two logits, which is what the model answers in evaluation (facebookresearch/deit; the paper averages softmax
    outputs). Padding and unlabelled images do not count. `prepare` turns a batch into the model's input.
    """
    was_training = model.training
    model.eval()
    sums = None
    for batch in loader:
        with autocast():
            cls_logits, dist_logits = heads(model, prepare(batch))
        answers = [cls_logits] if dist_logits is None else [cls_logits, dist_logits, (cls_logits + dist_logits) / 2]
        counts = torch.stack([_counts(logits.float(), batch.labels) for logits in answers])
        sums = counts if sums is None else sums + counts
    model.train(was_training)
    sums = place.sum(sums)
    return {head: _shares(row.tolist()) for head, row in zip(HEADS, sums)}


def _counts(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(4,) float64 on the device: right at first, right among five, sum of cross entropies, images."""
    counted = labels >= 0
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return torch.stack([best[:, 0].sum(), best.any(1).sum(), loss, counted.sum()]).double()


def _shares(row: list[float]) -> dict:
    right, among_five, loss, images = row
    if images == 0:
        raise UserError("there is no labelled image to evaluate on")
    return {"top1": right / images, "top5": among_five / images, "loss": loss / images}


@dataclass(kw_only=True)
class Evaluate:
    """Top-1 and top-5 of class head, distillation head and their average, of the weights and of the moving average."""

    checkpoint: "tyro.conf.Positional[Path]"  # noqa: F821
    """A run's folder, or last or best in it."""
    data_path: Path
    """DIR/val/CLASS/*."""
    batch_size: int = 64
    """Images per step."""
    input_size: int | None = None
    """Pixels on a side. Default: the checkpoint's."""
    device: str | None = None
    """cuda, cuda:N or cpu. Default: cuda where present."""
    json: bool = False
    """Print JSON in place of a table."""
