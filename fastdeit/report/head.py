"""The top of the page: how far the run is, its closing figures, what was trained on what, and the command."""

import json
import statistics
from math import prod
from pathlib import Path
from shlex import quote

from .. import recipes
from ..schedule import scaled_peak
from .markup import Html, count, duration, el, moment, percent, short
from .record import Record
from .settings import command

CLASSES = 12  # class names beyond which a few must do
NOT_LEARNED = ("__metadata__", "running_mean", "running_var", "num_batches_tracked")  # in a file of weights


def head(record: Record, title: str, drawn, changed: dict, recipe: dict | None) -> list:
    return [
        el("p", "fastdeit training run", class_="kind"),
        el("h1", title),
        *_state(record),
        _headline(record),
        _facts(record, drawn),
        el("pre", el("code", command(record.settings, changed, record.processes))) if recipe else None,
    ]


def _state(record: Record) -> list[Html]:
    at = [" on ", moment(record.ended)] if record.ended else []
    if record.finished:
        return [_sentence("Finished", at, f" after {count(record.step, 'step')}{_at_work(record)}.")]
    again = _sentence("It goes on with ", el("code", f"python -m fastdeit.train --resume {quote(str(record.folder))}"))
    if not record.lines:
        return [_sentence(el("strong", "Not finished: "), "the log holds no figures yet."), again]
    if record.total_steps:
        where = f"step {record.step:,} of {record.total_steps:,} ({100 * record.step / record.total_steps:.0f} %)"
    else:
        epochs = record.setting("optimization", "epochs")
        where = f"step {record.step:,}, in epoch {record.lines[-1]['epoch'] + 1} of {epochs}"
    if record.undistilled:
        where += f", and of the comparison run {record.undistilled[-1]['step']:,}"
    last = ["; the last figures are from ", moment(record.ended)] if record.ended else []
    return [_sentence(el("strong", "Not finished: "), f"{where}{_at_work(record)}", last, "."), again]


def _sentence(*parts) -> Html:
    return el("p", *parts, class_="state")


def _at_work(record: Record) -> str:
    if record.began is None:
        return ""
    return f" in {duration(record.ended - record.began - record.standstill)}"


def _headline(record: Record) -> Html | None:
    shown = dict(record.summary)
    if not record.finished:
        shown = {head: value["top1"] for head, value in record.accuracies.get("model", {}).items()}
    names = {"both": "top-1, both heads", "cls": "class head", "dist": "distillation head", "teacher": "teacher",
             "undistilled": "not distilled"}  # fmt: skip
    if "both" not in shown:
        names["cls"] = "top-1"
    cells = [(f"{percent(shown[key])}", "%", name) for key, name in names.items() if key in shown]
    speeds = [line["images_per_s"] for line in record.training if "images_per_s" in line]
    if speeds:
        cells.append((short(round(statistics.median(speeds))), "", "images/s, median"))
    if not cells:
        return None
    return el(
        "dl",
        [
            el("div", el("dt", name), el("dd", number, el("small", f" {unit}") if unit else None))
            for number, unit, name in cells
        ],
        class_="headline",
    )


def _facts(record: Record, drawn) -> Html:
    facts = {
        "Recipe": _recipe(record),
        "Student": _student(record),
        "Teacher": _teacher(record),
        "Data": _data(record, drawn),
        "Schedule": _schedule(record),
        "Arithmetic": _arithmetic(record),
        "Began": moment(record.began) if record.began else None,
    }
    rows = [[el("dt", name), el("dd", content)] for name, content in facts.items() if content]
    return el("dl", rows, class_="facts")


def _recipe(record: Record) -> str | None:
    name = record.setting("run", "recipe")
    if name not in recipes.names():
        return name
    return f"{name}: {recipes.describe(name).splitlines()[0].rstrip('.')}"


def _student(record: Record) -> str:
    size, parts = record.setting("data", "input_size"), [record.setting("model", "model")]
    if parameters := _parameters(record.folder / "last" / "model.safetensors"):
        parts.append(
            f"{parameters / 1e6:.2f} M parameters" if parameters < 1e8 else f"{parameters / 1e6:.0f} M parameters"
        )
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
    kind = record.setting("distillation", "distillation_type")
    if kind in (None, "none"):
        return None
    store, path = record.setting("distillation", "teacher_store"), record.setting("distillation", "teacher_path")
    name = f"stored answers, {store}" if store else path or record.setting("distillation", "teacher_model")
    strength = f"α = {short(record.setting('distillation', 'distillation_alpha'))}"
    if kind == "soft":
        strength += f", τ = {short(record.setting('distillation', 'distillation_tau'))}"
    return f"{name}, {kind} distillation, {strength}"


def _data(record: Record, drawn) -> str:
    parts = [str(record.setting("data", "data_path"))]
    if classes := record.description.get("classes"):
        names = ", ".join(classes[:CLASSES]) + (", …" if len(classes) > CLASSES else "")
        parts.append(f"{len(classes):,} classes ({names})")
    if drawn is not None:
        parts.append(f"{drawn.images:,} validation images")
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
