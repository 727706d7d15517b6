"""Pictures of a run: the first augmented batch, the curves, the cosine similarity of the two tokens."""

import json
import math
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .model import DeiT, token_cosine_similarity
from .parallel import is_sharded

SHOWN = 32  # images in the grid


def first_batch(trainer, path: Path) -> None:
    """The first batch of epoch 0 as the student sees it, each image with its label (both labels where mixed)."""
    trainer.train_loader.set_epoch(0)
    batch = next(iter(trainer.train_loader))
    trainer.train_loader.set_epoch(0)
    images = trainer.prepare(batch)[:SHOWN].float().cpu()
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (trainer.mean, trainer.std))
    pixels = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    columns = min(8, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.5 * columns, 1.75 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, image) in enumerate(zip(axes.flat, pixels)):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(_label(batch, i, trainer.classes), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _label(batch, i: int, classes) -> str:
    own = _name(int(batch.labels[i]), classes)
    if batch.mix is None or float(batch.mix.lam[i]) == 1:
        return own
    lam = float(batch.mix.lam[i])
    return f"{lam:.2f} {own}\n{1 - lam:.2f} {_name(int(batch.labels[batch.mix.partner[i]]), classes)}"


def _name(label: int, classes) -> str:
    return classes[label][:16] if label >= 0 else "no label"


def curves(folder: Path) -> None:
    """curves.png from metrics.jsonl: losses, top-1 of each head, learning rate, over the steps."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "eval"]
    figure, (loss, top1, lr) = plt.subplots(1, 3, figsize=(15, 4))
    steps = [record["step"] for record in training]
    terms = [("loss", "loss")]
    if any(record["teacher_loss"] for record in training):
        terms += [("class_loss", "class term"), ("teacher_loss", "teacher term")]
    if any(record.get("attention_loss") for record in training):
        terms.append(("attention_loss", "attention term"))
    for key, name in terms:
        loss.plot(steps, [record[key] for record in training], label=name, linewidth=1.2)
    loss.set(title="training loss", xlabel="step")
    names = {"cls": "class head", "dist": "distillation head", "both": "both, averaged"}
    for source, style in (("model", "-"), ("ema", "--")):
        for color, (head, name) in enumerate(names.items()):
            points = [(r["step"], 100 * r[source][head]) for r in evaluations if head in r.get(source, {})]
            if points:
                label = name + (" (moving average)" if source == "ema" else "")
                top1.plot(*zip(*points), style, color=f"C{color}", label=label, linewidth=1.2)
    top1.set(title="validation top-1, %", xlabel="step")
    lr.plot(steps, [record["lr"] for record in training], linewidth=1.2)
    lr.set(title="learning rate", xlabel="step")
    for axis in (loss, top1):
        axis.legend(fontsize=8)
    for axis in (loss, top1, lr):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=100)
    plt.close(figure)


def token_similarity(trainer, folder: Path) -> list[float] | None:
    """Cosine similarity of class and distillation token at the input and after each block, over one validation batch;
    drawn as token_similarity.png. None for a model without a distillation token."""
    if not (isinstance(trainer.model, DeiT) and trainer.model.arch.distilled):
        return None
    if is_sharded(trainer.model.cls_token):
        return None  # this process holds a share of the weights
    batch = next(iter(trainer.val_loader))
    real = batch.indices >= 0
    values = token_cosine_similarity(
        trainer.model, trainer.prepare(batch)[real.to(batch.labels.device)].float()
    ).tolist()
    figure, axis = plt.subplots(figsize=(5, 3.5))
    axis.plot(values, marker="o", linewidth=1.2)
    axis.set(
        title="class and distillation token", xlabel="block (0: input)", ylabel="cosine similarity", ylim=(-1.05, 1.05)
    )
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "token_similarity.png", dpi=100)
    plt.close(figure)
    return [round(value, 3) for value in values]
