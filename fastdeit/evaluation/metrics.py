"""Accuracy and calibration of each head, counted on the device and summed over the processes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit.distributed.world import World
from fastdeit.errors import UserError

from .calibration import BINS, calibration_counts, expected_calibration_error


@torch.inference_mode()
def accuracies(sources: dict[str, Callable], loader, prepare: Callable, world: World) -> dict[str, dict]:
    """{source: `Tally.result` over all processes' images}; a batch is decoded and prepared once for all sources.

    `prepare` turns a batch into the models' input, a source that into logits by head (models.heads.logits_by_head).
    """
    tallies = {name: Tally() for name in sources}
    for batch in loader:
        images = prepare(batch)
        for name, logits in sources.items():
            tallies[name].add(logits(images), batch.labels)
    return {name: tally.result(world) for name, tally in tallies.items()}


class Tally:
    """Counts of one model's predictions. Padding and unlabelled images do not count."""

    def __init__(self):
        self.heads: tuple[str, ...] = ()
        self.sums: Tensor | int = 0  # (heads, 4 + BINS * 3) float64 on the device
        self.totals = None

    def add(self, logits: dict[str, Tensor], labels: Tensor) -> None:
        self.heads = tuple(logits)
        self.sums = self.sums + torch.stack([_counts(values.float(), labels) for values in logits.values()])

    def result(self, world: World) -> dict[str, dict]:
        """{head: {"top1": share, "top5": share, "loss": cross entropy, "ece": calibration error}}, of all processes.

        Raises UserError if there was no labelled image.
        """
        self.totals = world.sum(self.sums).cpu()
        return {head: _shares(row) for head, row in zip(self.heads, self.totals)}

    def calibration(self) -> dict[str, Tensor]:
        """After `result`: (BINS, 3) counts of each head, see calibration_counts."""
        return {head: row[4:].view(BINS, 3) for head, row in zip(self.heads, self.totals)}


def _counts(logits: Tensor, labels: Tensor) -> Tensor:
    """Correct top-1, correct top-5, sum of cross entropies, images; then the calibration's."""
    right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    counts = torch.stack([right[:, 0].sum(), right.any(1).sum(), loss, (labels >= 0).sum()]).double()
    return torch.cat([counts, calibration_counts(logits, labels).flatten()])


def _shares(row: Tensor) -> dict:
    right, among_five, loss, images = row[:4].tolist()
    if images == 0:
        raise UserError("there is no labelled image to evaluate on")
    ece = expected_calibration_error(row[4:].view(BINS, 3))
    return {"top1": right / images, "top5": among_five / images, "loss": loss / images, "ece": ece}
