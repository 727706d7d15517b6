"""The top of the page: a run's closing figures, and what was trained on what."""

import json
import statistics
from math import prod
from pathlib import Path

from .. import recipes
from ..charts import short
from ..schedule import scaled_peak
from .formats import count, moment, percent
from .record import Record

CLASSES = 12  # class names beyond which a few must do
NOT_LEARNED = ("__metadata__", "running_mean", "running_var", "num_batches_tracked")  # in a file of weights


def headline(record: Record) -> list[tuple[str, str, str]]:
    """(name, number, unit): top-1 of each head, of what it is compared with, and the speed."""
    shown = record.summary
    if not record.finished:
        shown = {head: value["top1"] for head, value in record.accuracies.get("model", {}).items()}
    names = {"both": "top-1, both heads", "cls": "class head" if "both" in shown else "top-1",
             "dist": "distillation head", "teacher": "teacher", "undistilled": "not distilled"}  # fmt: skip
    figures = [(name, percent(shown[key]), "%") for key, name in names.items() if key in shown]
    speeds = [line["images_per_s"] for line in record.training if "images_per_s" in line]
    return figures + ([("images/s, median", short(round(statistics.median(speeds))), "")] if speeds else [])


def facts(record: Record, images: int | None) -> dict[str, str | None]:
    """What is known of the run by its name. images: in the validation split."""
    return {
        "Recipe": _recipe(record),
        "Student": _student(record),
        "Teacher": _teacher(record),
        "Data": _data(record, images),
        "Schedule": _schedule(record),
        "Arithmetic": _arithmetic(record),
        "Began": moment(record.began) if record.began else None,
    }


def _recipe(record: Record) -> str | None:
    name = record.setting("run", "recipe")
    return f"{name}: {recipes.describe(name).splitlines()[0].rstrip('.')}" if name in recipes.names() else name


def _student(record: Record) -> str:
    size, parts = record.setting("data", "input_size"), [record.setting("model", "model")]
    if parameters := _parameters(record.folder / "last" / "model.safetensors"):
        parts.append(f"{parameters / 1e6:.{2 if parameters < 1e8 else 0}f} M parameters")
    return ", ".join([*parts, f"{size} × {size} pixels"])


def _parameters(file: Path) -> int | None:
    """Counted in the header of the weights' file, which is JSON behind its length."""
    try:
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    except (OSError, ValueError):
        return None
    return sum(prod(tensor["shape"]) for name, tensor in header.items() if not name.endswith(NOT_LEARNED))


def _teacher(record: Record) -> str | None:
    settings = record.settings["distillation"]
    kind, store = settings.get("distillation_type"), settings.get("teacher_store")
    if kind in (None, "none"):
        return None
    name = f"logit cache {store}" if store else settings.get("teacher_path") or settings.get("teacher_model")
    strength = f"α = {short(settings['distillation_alpha'])}"
    if kind == "soft":
        strength += f", τ = {short(settings['distillation_tau'])}"
    return f"{name}, {kind} distillation, {strength}"


def _data(record: Record, images: int | None) -> str:
    parts = [str(record.setting("data", "data_path"))]
    if classes := record.description.get("classes"):
        names = ", ".join(classes[:CLASSES]) + (", …" if len(classes) > CLASSES else "")
        parts.append(f"{len(classes):,} classes ({names})")
    if images is not None:
        parts.append(f"{images:,} validation images")
    return "; ".join(parts)


def _schedule(record: Record) -> str:
    epochs = count(record.setting("optimization", "epochs"), "epoch")
    steps = f" of {count(record.steps_per_epoch, 'step')}" if record.steps_per_epoch else ""
    images = f", {record.images_per_step:,} images a step" if record.images_per_step else ""
    return f"{epochs}{steps}{images}; {record.setting('optimization', 'opt')}{_peak(record)}"


def _peak(record: Record) -> str:
    rate, unscaled = record.setting("optimization", "lr"), record.setting("optimization", "unscale_lr")
    if not unscaled and not record.images_per_step:
        return f", learning rate {short(rate)} for 512 images a step"
    return f", peak learning rate {short(scaled_peak(rate, record.images_per_step, scale=not unscaled))}"


def _arithmetic(record: Record) -> str:
    parts = [record.setting("run", "device"), record.setting("speed", "precision")]  # None: decided by the machine
    if record.processes:
        parts.append(f"{record.processes} process{'' if record.processes == 1 else 'es'}")
    parts.append(f"{record.setting('speed', 'attention')} attention")
    parts.append("compiled" if record.setting("speed", "compile") else "not compiled")
    return ", ".join(filter(None, parts))
