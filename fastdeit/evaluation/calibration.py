"""Whether a model is as often right as it is confident: expected calibration error and the diagram behind it.

Guo et al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599), section 2: images are put into bins of equal
width by their highest probability; ECE = sum over bins of n_bin / n * |accuracy_bin - mean confidence_bin|.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15
FEW = 10  # images: the accuracy of a bin with fewer says next to nothing


def calibration_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """(BINS, 3) float64 on the device: images, correct predictions, sum of confidences. Add them up over batches.

    logits: (batch, classes) float32. labels: (batch,) int64, negative ones do not count. Bin b holds the confidences in
    (b / BINS, (b + 1) / BINS].
    """
    confidence, predicted = logits.softmax(1).max(1)
    bins = (confidence.double() * BINS).ceil().long().clamp(1, BINS) - 1
    columns = torch.stack([torch.ones_like(confidence), (predicted == labels).float(), confidence], dim=1).double()
    # A product with one-hot rows rather than a scatter, whose order of additions varies on a GPU.
    return (F.one_hot(bins, BINS) * (labels >= 0)[:, None]).double().T @ columns


def expected_calibration_error(counts) -> float:
    """ECE, in [0, 1], from counts (BINS, 3) as `calibration_counts` gives them."""
    images, right, confidence = np.asarray(counts, dtype=np.float64).T
    return float(np.abs(right - confidence).sum() / images.sum())


def draw_calibration(counts: dict[str, np.ndarray], path: Path) -> None:
    """A reliability diagram for each title: accuracy over confidence, and how many images have that confidence. Bins
    of few images are drawn alone, and the line breaks at them and at empty ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(counts), 4.6), layout="constrained")
    axes = figure.subplots(2, len(counts), squeeze=False, sharex=True, sharey="row", height_ratios=[3, 1])
    for (title, table), diagram, histogram in zip(counts.items(), *axes):
        images, right, confidence = np.asarray(table, dtype=np.float64).T
        diagram.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
        x, y = (values / np.maximum(images, 1) for values in (confidence, right))
        few, enough = (0 < images) & (images < FEW), images >= FEW
        diagram.plot(np.where(enough, x, np.nan), np.where(enough, y, np.nan), "o-", markersize=4, clip_on=False)
        diagram.plot(x[few], y[few], "o", markersize=4, color="0.6", fillstyle="none", clip_on=False)
        diagram.set(title=f"{title}\nECE {100 * expected_calibration_error(table):.2f} %", xlim=(0, 1), ylim=(0, 1))
        diagram.set_box_aspect(1)
        histogram.set_box_aspect(1 / 3)
        histogram.bar((np.arange(BINS) + 0.5) / BINS, 100 * images / images.sum(), width=0.9 / BINS, color="0.6")
        histogram.set(xlabel="confidence")
        diagram.grid(alpha=0.3)
    axes[0][0].set(ylabel=f"accuracy (hollow: under {FEW} images)")
    axes[1][0].set(ylabel="images, %")
    figure.savefig(path, dpi=110)
