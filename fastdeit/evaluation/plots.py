"""Pictures of a run: the first augmented batch, the curves, the cosine similarity of the two tokens."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from fastdeit.checkpoint import metrics_log
from fastdeit.distributed.parallel import is_sharded
from fastdeit.models.deit import DeiT
from fastdeit.models.token_similarity import token_cosine_similarity

from . import charts

SHOWN = 32  # images in the grid


def first_batch(loader, prepare: Callable, mean, std, classes: Sequence[str], path: Path) -> None:
    """The first batch of epoch 0 as the student sees it, each image with its label (both labels where mixed)."""
    loader.set_epoch(0)
    batch = next(iter(loader))
    loader.set_epoch(0)
    images = prepare(batch)[:SHOWN].float().cpu()
    mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in (mean, std))
    pixels = (images * std + mean).clamp(0, 1).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    columns = min(8, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    figure = Figure(figsize=(1.5 * columns, 1.75 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, image) in enumerate(zip(axes.flat, pixels)):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(_label(batch, i, classes), fontsize=8, parse_math=False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def _label(batch, i: int, classes) -> str:
    own = _name(int(batch.labels[i]), classes)
    if batch.mix is None or float(batch.mix.lam[i]) == 1:
        return own
    lam = float(batch.mix.lam[i])
    return f"{lam:.2f} {own}\n{1 - lam:.2f} {_name(int(batch.labels[batch.mix.partner[i]]), classes)}"


def _name(label: int, classes) -> str:
    return classes[label][:16] if label >= 0 else "no label"


def curves(folder: Path) -> None:
    """curves.png from metrics.jsonl: losses, top-1 of each head, learning rate and throughput, over the steps."""
    charts.png(folder / "curves.png", charts.of_training(*metrics_log.read(folder / "metrics.jsonl")))


def token_similarity(model, loader, prepare: Callable, folder: Path) -> list[float] | None:
    """Cosine similarity of class and distillation token at the input and after each block, over one validation batch;
    drawn as token_similarity.png. None for a model without a distillation token."""
    if not (isinstance(model, DeiT) and model.arch.distilled):
        return None
    if is_sharded(model.cls_token):
        return None  # this process holds a shard of the weights
    batch = next(iter(loader))
    real = batch.indices >= 0
    values = token_cosine_similarity(model, prepare(batch)[real.to(batch.labels.device)].float()).tolist()
    charts.png(folder / "token_similarity.png", [charts.of_tokens(values)])
    return [round(value, 3) for value in values]
