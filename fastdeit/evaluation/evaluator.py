"""Models on labelled images: every figure, and the files that show them in detail."""

from pathlib import Path

from rich.console import Console
from rich.progress import track

from fastdeit.checkpoint.atomic import replace_json
from fastdeit.config import height_width
from fastdeit.models.heads import HEADS

from .calibration import draw_calibration
from .confusion import Predictions, draw_confusion, write_classes
from .metrics import Tally


def evaluate(classifiers: dict, loader, world, output: Path | None = None) -> dict:
    """{"model": {head: {"top1", "top5", "loss", "ece"}}, "ema": ..., "data": {...}}

    "data" tells the number of "images" that count, of "classes", the "input_size", and the "unreadable" images with the
    cause of each.
    classifiers: "model" and perhaps "ema", which take the same input: every image is decoded once. output: the folder
    for accuracy.json, classes.csv, confusion.png, confusion_ema.png and calibration.png, or None.
    """
    if output is not None and world.is_main:
        output.mkdir(parents=True, exist_ok=True)  # refused now, not when all images have been seen
    tallies = {source: Tally() for source in classifiers}
    predictions = {source: Predictions(len(loader.index), world.device) for source in classifiers}
    for batch in _with_progress(loader, world):
        images = classifiers["model"].prepare(batch)
        for source, classifier in classifiers.items():
            logits = classifier.logits(images)
            tallies[source].add(logits, batch.labels)
            if output is not None:
                predictions[source].add(logits, batch.indices)
    result = {source: tally.result(world) for source, tally in tallies.items()}
    unreadable = {}
    for causes in world.gather(loader.bad_files.causes):  # each process has met its own
        unreadable |= causes
    result["data"] = {
        "images": len(loader.index) + len(loader.index.bad) - len(unreadable), "classes": len(loader.index.classes),
        "unreadable": unreadable, "input_size": classifiers["model"].input_size,
    }  # fmt: skip
    if output is not None:
        predictions = {source: kept.result(world) for source, kept in predictions.items()}
        if world.is_main:
            _write(output, result, tallies, predictions, loader.index)
    return result


def _write(output: Path, result: dict, tallies: dict, predictions: dict, index) -> None:
    replace_json(output / "accuracy.json", result)
    prefixes = {"model": "", "ema": "ema_"}
    columns, diagrams = {}, {}
    for source, heads in predictions.items():
        moving = ", moving average" if source == "ema" else ""
        columns |= {f"{prefixes[source]}top1_{head}": kept for head, kept in heads.items()}
        diagrams |= {HEADS[head] + moving: counts for head, counts in tallies[source].calibration().items()}
        final = list(heads)[-1]  # what the model returns: the average of both heads, or its only one
        title = f"{HEADS[final]}{moving}: top-1 {100 * result[source][final]['top1']:.2f} %"
        file = "confusion.png" if source == "model" else "confusion_ema.png"
        draw_confusion(output / file, index.classes, heads[final], index.labels, title)
    write_classes(output / "classes.csv", index.classes, index.labels, columns)
    draw_calibration(diagrams, output / "calibration.png")


def _with_progress(loader, world):
    console = Console(stderr=True)
    return track(
        loader, "evaluating", console=console, transient=True, disable=not (console.is_terminal and world.is_main)
    )


def about(classifier, data: dict) -> str:
    """What stands below the table: the images, how they were prepared, and what was done to the weights."""
    height, width = height_width(data["input_size"])
    sentences = [
        f"{data['images']:,} images of {data['classes']:,} classes at {height} x {width} pixels, crop_pct "
        f"{classifier.crop_pct:g}",
        *classifier.notes,
    ]
    if data["unreadable"]:
        name, cause = next(iter(data["unreadable"].items()))
        count = len(data["unreadable"])
        what = f"{count} images could not be read and do not count, the first" if count > 1 else "one could not be read"
        sentences.append(f"{what}: {name} ({cause})")
    return "\n".join(sentences)
