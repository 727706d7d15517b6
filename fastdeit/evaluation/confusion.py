"""The class a model predicts for every image; from it, accuracy by class and which classes are confused."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdeit.distributed.world import World

NAMED = 30  # classes whose names fit along the picture's sides
CELLS = 1000  # along a side of the picture: with more classes neighbours share one
LISTED = 20  # confusions named beside the picture


class Predictions:
    """The most probable class of each of `images` images by each head, kept on the device until they are asked for."""

    def __init__(self, images: int, device: torch.device):
        self.images, self.device = images, device
        self.predictions: dict[str, Tensor] = {}  # (images,) int64 a head: class + 1; 0 for another process's image

    def add(self, logits: dict[str, Tensor], indices: Tensor) -> None:
        """logits: (batch, classes) a head. indices: (batch,) on the CPU, the images' indices, -1 for padding."""
        counted = indices >= 0
        rows = indices[counted].to(self.device)
        for head, values in logits.items():
            kept = self.predictions.setdefault(head, torch.zeros(self.images, dtype=torch.int64, device=self.device))
            kept[rows] = values.argmax(1)[counted.to(self.device)] + 1

    def result(self, world: World) -> dict[str, np.ndarray]:
        """(images,) int64 a head, from all processes; -1 for an image that could not be read."""
        return {head: (world.sum(kept) - 1).cpu().numpy() for head, kept in self.predictions.items()}


def by_class(predictions: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(images, correct predictions) of each class, both (classes,) int64; unread (-1) and unlabelled (-100) omitted."""
    counted = (predictions >= 0) & (labels >= 0)
    images = np.bincount(labels[counted], minlength=classes)
    return images, np.bincount(labels[counted & (predictions == labels)], minlength=classes)


def write_classes(path: Path, classes: Sequence[str], labels: np.ndarray, columns: dict[str, np.ndarray]) -> None:
    """CSV: class, images, and for each column of predictions its top-1 in that class (a fraction; empty: no images)."""
    tables = {name: by_class(predictions, labels, len(classes)) for name, predictions in columns.items()}
    images = next(iter(tables.values()))[0]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "images", *tables])
        for i, name in enumerate(classes):
            shares = [f"{right[i] / count[i]:.4f}" if count[i] else "" for count, right in tables.values()]
            writer.writerow([name, images[i], *shares])


def confusions(predictions: np.ndarray, labels: np.ndarray, classes: int) -> list[tuple[int, int, int]]:
    """(label, prediction, images) for every wrong pair that occurred, the most frequent first."""
    wrong = (predictions >= 0) & (labels >= 0) & (predictions != labels)
    pairs, counts = np.unique(labels[wrong] * classes + predictions[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(pair) // classes, int(pair) % classes, int(count)) for pair, count in zip(pairs[order], counts[order])]


def draw_confusion(path: Path, classes: Sequence[str], predictions: np.ndarray, labels: np.ndarray, title: str) -> None:
    """The confusion matrix, each row as shares of that class, and the most frequent confusions by name."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    shares, count = confusion_matrix(predictions, labels, len(classes)), len(classes)
    listed = confusions(predictions, labels, count)[:LISTED]
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    # The layout is off by some pixels where a square axis fills its cell: without room its label is cut.
    figure.get_layout_engine().set(w_pad=0.2)
    matrix, bars = figure.subplots(1, 2, width_ratios=[1.15, 0.85], gridspec_kw={"wspace": 0.06})
    # The square root lets a confusion of one per cent be seen beside a diagonal of nearly all.
    image = matrix.imshow(100 * shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    matrix.set(title=title, xlabel="predicted class", ylabel="true class")
    named = count <= NAMED
    names = [_short(name) for name in classes] if named else []
    ticks = range(len(names))
    matrix.set_xticks(ticks, names, rotation=90, parse_math=False)
    matrix.set_yticks(ticks, names, parse_math=False)
    if named:
        for (row, column), share in np.ndenumerate(100 * shares):
            if share >= 0.5:
                color = "white" if share > 40 else "black"
                matrix.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, ax=matrix, label="% of the class", shrink=0.8)
    bars.barh([str(i) for i in range(len(listed))], [images for *_, images in listed], color="0.8")
    bars.invert_yaxis()
    bars.set_yticks([])
    bars.set(title="most frequent confusions" if listed else "not one confusion", xlabel="images")
    for row, (label, predicted, images) in enumerate(listed):
        text = f" {_short(classes[label])} taken for {_short(classes[predicted])}: {images}"
        bars.text(0, row, text, va="center", fontsize=9, parse_math=False)
    bars.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=100)


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """(cells, cells) shares of each row's images; cells = classes, up to CELLS."""
    cells = min(classes, CELLS)
    counted = (predictions >= 0) & (labels >= 0)
    rows, columns = (values[counted] * cells // classes for values in (labels, predictions))
    counts = np.bincount(rows * cells + columns, minlength=cells * cells).reshape(cells, cells)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"
