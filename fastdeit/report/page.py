"""What page.html is filled with."""

import shlex
from pathlib import Path
from typing import NamedTuple

import jinja2

from .. import charts
from ..accuracy import HEADS
from ..command import in_words
from ..tables import NAMES
from . import formats, settings
from .facts import facts, headline
from .record import Record

# Of each phase of trainer.py, in the order of a step: what the reader is told.
PHASES = {
    "data": "waiting for images",
    "prepare": "normalise, erase, mix",
    "teacher": "teacher",
    "forward": "student, forward",
    "loss": "loss",
    "backward": "backward",
    "optimizer": "optimizer, moving average",
    "evaluation": "evaluation",
    "rest": "between steps",
}
COLUMNS = ["top-1, %", "top-5, %", "cross entropy", "ECE, %", "best top-1, %", "in epoch"]


class Phase(NamedTuple):
    name: str
    seconds: float
    share: float


def page(record: Record) -> str:
    """The whole document, in one string."""
    from .pictures import embedded

    drawn, reason = _draw(record)
    recipe = settings.recipe_settings(record.settings)
    changed = settings.differences(record.settings, recipe)
    columns, accuracies = _accuracies(record)
    phases = _phases(record)
    return _template().render(
        record=record,
        title=record.folder.resolve().name,
        headline=headline(record),
        facts=facts(record, drawn and drawn.images),
        command=settings.command(record.settings, changed, record.processes) if recipe else None,
        charts=charts.of_training(
            record.training, record.evaluations, record.undistilled, record.summary.get("teacher")
        ),
        columns=columns,
        accuracies=accuracies,
        phases=phases,
        together=Phase("together", sum(phase.seconds for phase in phases), 1.0),
        first_batch=embedded(record.folder / "first_batch.png"),
        drawn=drawn,
        reason=reason,
        similarity=embedded(record.folder / "token_similarity.png"),  # where it cannot be drawn
        nonfinite=[_nonfinite(line) for line in record.nonfinite],
        changed=changed,
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "count": formats.count, "duration": formats.duration, "moment": formats.moment, "percent": formats.percent,
        "grouped": "{:,}".format, "short": charts.short, "svg": charts.svg, "of_tokens": charts.of_tokens,
        "written": settings.written, "quote": lambda path: shlex.quote(str(path)),
    }  # fmt: skip
    return environment.get_template("page.html")


def _draw(record: Record):
    """(Looks, None), or (None, the sentence that says why there are none)."""
    from . import pictures

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


def _accuracies(record: Record) -> tuple[list[str], dict[str, list[list[str]]]]:
    """The columns of which a figure is known, and the rows below them in groups; – where a row has none."""
    if not record.evaluations:
        return [], {}
    groups = {
        {"model": "trained weights", "ema": "their moving average"}[source]: [
            [HEADS[head], *_figures(value), *_best(record.evaluations, source, head)] for head, value in heads.items()
        ]
        for source, heads in record.accuracies.items()
    }
    others = [key for key in ("undistilled", "teacher") if key in record.summary]
    if others:
        groups["for comparison"] = [[NAMES[key], formats.percent(record.summary[key]), *5 * ["–"]] for key in others]
    head = [f"after epoch {record.evaluations[-1]['epoch'] + 1}", *COLUMNS]
    known = [i for i in range(len(head)) if any(row[i] != "–" for rows in groups.values() for row in rows)]
    return [head[i] for i in known], {name: [[row[i] for i in known] for row in rows] for name, rows in groups.items()}


def _figures(value: dict) -> list[str]:
    loss = f"{value['loss']:.4f}" if "loss" in value else "–"
    return [formats.percent(value["top1"]), formats.percent(value.get("top5")), loss, formats.percent(value.get("ece"))]


def _best(evaluations: list[dict], source: str, head: str) -> list[str]:
    """Top-1 of the best evaluation, the first of equals, and its epoch."""
    best = max((line for line in evaluations if head in line.get(source, {})), key=lambda line: line[source][head])
    return [formats.percent(best[source][head]), str(best["epoch"] + 1)]


def _phases(record: Record) -> list[Phase]:
    """In the order of PHASES; one that this version does not know comes before the evaluation. [] for a log that does
    not know them."""
    if not record.timed_steps:
        return []
    order = {name: place for place, name in enumerate(PHASES)}
    found = sorted(record.phases.items(), key=lambda phase: order.get(phase[0], order["evaluation"] - 0.5))
    total = sum(record.phases.values())
    return [
        Phase(PHASES.get(name, name), seconds, seconds / total)
        for name, seconds in found
        if seconds / record.timed_steps >= 5e-6  # one that a run does not have, such as the teacher's, is a time stamp
    ]


def _nonfinite(line: dict) -> list[str]:
    """Step, what became of it, norm of the gradient, and the terms of the loss that are words, as JSON has no nan."""
    terms = [
        f"{name} {value}" for rank in line["ranks"] for name, value in zip(line["terms"], rank["losses"])
        if isinstance(value, str)
    ]  # fmt: skip
    bad = ", ".join(dict.fromkeys(terms)) or "the gradient only"
    return [f"{line['step']:,}", "skipped" if line["skipped"] else "stopped the run", line["gradient_norm"], bad]
