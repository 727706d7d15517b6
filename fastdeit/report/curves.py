"""Curves of a run, and where its time went."""

from .chart import Series, chart, legend
from .markup import Html, duration, el, percent, short, table, table_row
from .record import Record

HEADS = {"cls": "class head", "dist": "distillation head", "both": "both heads, averaged"}
STYLES = {"cls": "c1", "dist": "c2", "both": "c3"}

# Of each phase of trainer.py: what the reader is told.
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


def curves(record: Record, teacher: float | None) -> list[Html]:
    """A figure each for loss, accuracy, learning rate and throughput, as far as there are figures for them.

    teacher: its top-1, drawn as a line to reach
    """
    figures = []
    if record.training:
        figures.append(_figure("Training loss", None, _losses(record)))
    if accuracies := _accuracies(record, teacher):
        figures.append(_figure("Validation top-1", "%", accuracies, _names(accuracies), high=_top(accuracies)))
    for title, unit, key in (("Learning rate", None, "lr"), ("Throughput", "images/s", "images_per_s")):
        if points := _points(record, key):
            figures.append(_figure(title, unit, [Series(title.lower(), points, "c1")], low=0))
    return figures


def _top(lines: list[Series]) -> float | None:
    """100 % is where the axis ends, when the curves come near it."""
    highest = max(y for line in lines for _, y in line.points)
    return 100 if highest > 90 else None


def _points(record: Record, key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in record.training if key in line]


def _losses(record: Record) -> list[Series]:
    named = {
        "class_loss": ("class term", "c1"),
        "teacher_loss": ("teacher term", "c2"),
        "attention_loss": ("attention term", "c4"),
    }
    terms = [Series(name, _points(record, key), style) for key, (name, style) in named.items()]
    terms = [term for term in terms if any(value for _, value in term.points)]
    whole = _points(record, "loss")
    return [Series("loss", whole, "c3"), *terms] if len(terms) > 1 else [Series("loss", whole, "c1")]


def _accuracies(record: Record, teacher: float | None) -> list[Series]:
    lines = []
    for source, suffix, style in (("model", "", ""), ("ema", ", moving average", " dashed")):
        for head, name in HEADS.items():
            points = _top1(record.evaluations, source, head)
            if points:
                lines.append(Series(name + suffix, points, STYLES[head] + style))
    twin = [head for head in HEADS if _top1(record.undistilled, "model", head)]
    if twin:
        lines.append(Series("not distilled", _top1(record.undistilled, "model", twin[-1]), "grey"))
    if teacher is not None and lines:
        ends = (lines[0].points[0][0], lines[0].points[-1][0])
        lines.append(Series("teacher", [(step, 100 * teacher) for step in ends], "grey dotted"))
    return lines


def _names(lines: list[Series]) -> list[Series]:
    """For the legend: the lines of the moving average share an entry, their colours are those of the heads."""
    dashed = [line for line in lines if "dashed" in line.style]
    named = [line for line in lines if line not in dashed]
    return [*named, Series("moving average", [], "grey dashed")] if dashed else named


def _top1(evaluations: list[dict], source: str, head: str) -> list[tuple[float, float]]:
    return [(line["step"], 100 * line[source][head]) for line in evaluations if head in line.get(source, {})]


def _figure(title: str, unit: str | None, lines: list[Series], named: list[Series] | None = None, **options) -> Html:
    ends = "; ".join(f"{line.name} from {short(line.points[0][1])} to {short(line.points[-1][1])}" for line in lines)
    return el(
        "figure",
        el("figcaption", el("h3", title, el("small", f" {unit}") if unit else None)),
        legend(named or lines) if len(lines) > 1 else None,
        chart(lines, label=f"{title} over the steps: {ends}", **options),
    )


def similarity_figure(values: list[float]) -> Html:
    """Cosine similarity of class and distillation token at the input and after each block."""
    line = Series("cosine similarity", list(enumerate(values)), "c1 marked")
    listed = ", ".join(f"{value:.2f}" for value in values)
    return el(
        "figure",
        el("figcaption", el("h3", "Class and distillation token", el("small", " cosine similarity"))),
        chart(
            [line], label=f"Cosine similarity at the input and after each block: {listed}", x_label="block (0: input)",
            low=min(0, *values), high=1,
        ),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Time


def time_spent(record: Record) -> Html | None:
    """A stacked bar and a table of the phases; None for a log that does not know them."""
    phases, steps = record.phases, record.timed_steps
    if not phases or not steps:
        return None
    total = sum(phases.values())
    shown = [
        (name, seconds, f"p{i % 9}")
        for i, (name, seconds) in enumerate(_ordered(phases))
        if seconds / steps >= 5e-6  # one that a run does not have, such as the teacher's, takes a time stamp
    ]
    bar = el(
        "div",
        [
            el("span", _label(name) if seconds > 0.14 * total else None, class_=style, style=f"flex-grow:{seconds:.4f}")
            for name, seconds, style in shown
        ],
        class_="bar",
        role="img",
        aria_label="; ".join(f"{_label(name)} {percent(seconds / total, 1)} %" for name, seconds, _ in shown),
    )
    rows = [
        [[el("i", class_=f"swatch {style}"), _label(name)], *_columns(seconds, total, steps)]
        for name, seconds, style in shown
    ]
    rows.append(table_row(["together", *_columns(total, total, steps)], class_="sum"))
    return el("div", bar, table(["phase", "seconds", "share, %", "ms a step"], rows, class_="figures phases"))


def _ordered(phases: dict[str, float]) -> list[tuple[str, float]]:
    """In the order of PHASES; one that this version does not know comes before the evaluation."""
    order = {name: place for place, name in enumerate(PHASES)}
    unknown = order["evaluation"] - 0.5
    return sorted(phases.items(), key=lambda phase: order.get(phase[0], unknown))


def _columns(seconds: float, total: float, steps: int) -> list[str]:
    return [f"{seconds:,.1f}", percent(seconds / total, 1), f"{1000 * seconds / steps:,.2f}"]


def _label(phase: str) -> str:
    return PHASES.get(phase, phase)


def time_notes(record: Record) -> str:
    sentences = [
        "Between steps: checkpoints, the log, starting again.",
        "On a GPU, phases are the GPU's time: waiting for images counts only when it had nothing left to do.",
        "Compilation, where asked for, is in the first step's forward and backward.",
    ]
    if record.standstill:
        sentences.append(
            f"Left out: {duration(record.standstill)} in which the run stood still, stopped and then gone on with."
        )
    return " ".join(sentences)
