"""Accuracy of each head, counted on the device and summed over the processes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .command import UserError
from .distributed import Place

HEADS = ("cls", "dist", "both")


@torch.inference_mode()
def accuracy(answer: Callable, loader, prepare: Callable, place: Place) -> dict[str, dict]:
    """{"cls": {"top1": share, "top5": share, "loss": mean cross entropy}, ...} over all processes' images.

    `prepare` turns a batch into the model's input, `answer` that into (class logits, distillation logits or None). With
    a distillation head there are three entries: class head, distillation head, and "both": the average of the two
    logits, which is what the model answers in evaluation (facebookresearch/deit; the paper averages softmax outputs).
    Padding and unlabelled images do not count.
    """
    sums = None
    for batch in loader:
        cls_logits, dist_logits = answer(prepare(batch))
        answers = [cls_logits] if dist_logits is None else [cls_logits, dist_logits, (cls_logits + dist_logits) / 2]
        counts = torch.stack([_counts(logits.float(), batch.labels) for logits in answers])
        sums = counts if sums is None else sums + counts
    return {head: _shares(row) for head, row in zip(HEADS, place.sum(sums).tolist())}


def _counts(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(4,) float64 on the device: right at first, right among five, sum of cross entropies, images."""
    right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return torch.stack([right[:, 0].sum(), right.any(1).sum(), loss, (labels >= 0).sum()]).double()


def _shares(row: list[float]) -> dict:
    right, among_five, loss, images = row
    if images == 0:
        raise UserError("there is no labelled image to evaluate on")
    return {"top1": right / images, "top5": among_five / images, "loss": loss / images}
