"""What page.html is filled with."""

import shlex
import statistics
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import jinja2

from fastdeit import recipes
from fastdeit.errors import in_words
from fastdeit.evaluation import charts, tables
from fastdeit.training.optimizer import scaled_peak
from fastdeit.tuning import table

from . import pictures, settings
from .record import Record

# Of each phase of trainer.py, in the order of a step: what the reader is told.
PHASES = {
    "data": "waiting for images",
    "step": "the whole step, one CUDA graph",
    "prepare": "normalise, erase, mix",
    "teacher": "teacher",
    "forward": "student, forward",
    "loss": "loss",
    "backward": "backward",
    "optimizer": "optimizer, moving average",
    "evaluation": "evaluation",
    "rest": "between steps",
}


class Phase(NamedTuple):
    name: str
    seconds: float
    share: float


def page(record: Record) -> str:
    """The whole document, in one string."""
    drawn, reason = _draw(record)
    name, recipe = record.setting("recipe"), settings.recipe_settings(record.settings)
    changed = settings.differences(record.settings, recipe)
    phases = _phases(record)
    return _template().render(
        record=record,
        setting=record.setting,
        names=tables.NAMES,
        title=record.folder.resolve().name,
        headline=_headline(record),
        about=recipes.describe(name).splitlines()[0].rstrip(".") if name in recipes.names() else None,
        parameters=record.parameters,
        peak=_peak(record),
        command=settings.command(record.settings, changed, record.processes) if recipe else None,
        changed=changed,
        charts=charts.of_training(
            record.training, record.evaluations, record.undistilled, record.summary.get("teacher")
        ),
        phases=phases,
        together=Phase("together", sum(phase.seconds for phase in phases), 1.0),
        first_batch=pictures.embedded(record.folder / "first_batch.png"),
        drawn=drawn,
        reason=reason,
        similarity=pictures.embedded(record.folder / "token_similarity.png"),  # where it cannot be drawn
        nonfinite=[_nonfinite(line) for line in record.nonfinite],
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "about": table.about, "origin": table.origin_of, "rows": table.rows_of,
        "count": count, "duration": duration, "grouped": "{:,}".format, "moment": moment, "of_tokens": charts.of_tokens,
        "percent": percent, "quote": lambda path: shlex.quote(str(path)), "short": charts.short, "svg": charts.svg,
        "written": settings.written,
    }  # fmt: skip
    return environment.get_template("page.html")


def _draw(record: Record) -> tuple[pictures.Looks | None, str | None]:
    """Without looks, the sentence that says why there are none."""
    if not record.description:
        return None, "there is no checkpoint"
    try:
        return pictures.look(record.folder, record.settings), None
    except pictures.NotDrawn as error:
        return None, str(error)
    except Exception as error:
        words = in_words(error)
        if words is None:
            raise
        return None, words


def _headline(record: Record) -> list[tuple[str, str, str]]:
    """(name, number, unit): top-1 of each head, of what it is compared with, and the speed."""
    shown = record.summary
    if not record.finished:
        shown = {head: value["top1"] for head, value in record.accuracies.get("model", {}).items()}
    names = {"both": "top-1, both heads", "cls": "class head" if "both" in shown else "top-1",
             "dist": "distillation head", "teacher": "teacher", "undistilled": "not distilled"}  # fmt: skip
    figures = [(name, percent(shown[key]), "%") for key, name in names.items() if key in shown]
    speeds = [line["images_per_s"] for line in record.training if "images_per_s" in line]
    return figures + ([("images/s, median", charts.short(round(statistics.median(speeds))), "")] if speeds else [])


def _peak(record: Record) -> str:
    rate, unscaled = record.setting("lr"), record.setting("unscale_lr")
    if not unscaled and not record.images_per_step:
        return f"learning rate {charts.short(rate)} for 512 images a step"
    return f"peak learning rate {charts.short(scaled_peak(rate, record.images_per_step, scale=not unscaled))}"


def _phases(record: Record) -> list[Phase]:
    """In the order of PHASES; one that this version does not know comes before the evaluation. [] for a log that does
    not know them."""
    order = {name: place for place, name in enumerate(PHASES)}
    found = sorted(record.phases.items(), key=lambda phase: order.get(phase[0], order["evaluation"] - 0.5))
    total = sum(record.phases.values())
    return [
        Phase(PHASES.get(name, name), seconds, seconds / total)
        for name, seconds in found
        # One that a run does not have, such as the teacher's, is a time stamp.
        if record.timed_steps and seconds / record.timed_steps >= 5e-6
    ]


def _nonfinite(line: dict) -> list[str]:
    """Step, what became of it, norm of the gradient, and the terms of the loss that are words, as JSON has no nan."""
    terms = [
        f"{name} {value}" for rank in line["ranks"] for name, value in zip(line["terms"], rank["losses"])
        if isinstance(value, str)
    ]  # fmt: skip
    bad = ", ".join(dict.fromkeys(terms)) or "the gradient only"
    return [f"{line['step']:,}", "skipped" if line["skipped"] else "stopped the run", line["gradient_norm"], bad]


# ---------------------------------------------------------------------------------------------------------------------
# As the page writes numbers


def percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f}"


def duration(seconds: float) -> str:
    """3.4 s, 2 min 05 s, 7 h 03 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def moment(seconds: float) -> str:
    """A time of the clock in the local zone; seconds since 1970."""
    when = datetime.fromtimestamp(seconds)
    return f"{when.day} {when:%B %Y, %H:%M}"


def count(number: int, name: str, plural: str = "s") -> str:
    return f"{number:,} {name}{'' if number == 1 else plural}"
