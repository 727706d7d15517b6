"""Line charts of a run by matplotlib: on the axes of a PNG, or as an SVG whose colours follow the page's scheme."""

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fastdeit.models.heads import HEADS

# In a PNG these colours; in an SVG the CSS variables of these names, which differ between light and dark.
COLORS = {
    "c1": "#1f6fb4", "c2": "#c9600f", "c3": "#17876a", "c4": "#8a4fb0", "grey": "#8b8983", "soft": "#66645f",
    "rule": "#dfddd6",
}  # fmt: skip
POINTS = 400  # along a line: more are averaged, a line is not wider than that
SIZE = (480, 250)  # of an SVG, in its own units: pixels on a wide page

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """color: a key of COLORS. dash: matplotlib's line style. A point whose value is not finite is a gap."""

    name: str
    points: Sequence[Point]
    color: str
    dash: str = "-"


@dataclass(frozen=True)
class Chart:
    """Lines over a common horizontal axis. low, high: values that the vertical axis reaches at least."""

    title: str
    lines: list[Line]
    unit: str = ""
    low: float | None = None
    high: float | None = None
    x_label: str = "step"
    marker: str = ""  # on every point

    @property
    def legend(self) -> list[Line]:
        """The lines of the moving average share an entry: their colours are those of the heads."""
        named = [line for line in self.lines if line.dash != "--"]
        return named if len(named) == len(self.lines) else [*named, Line("moving average", (), "grey", "--")]

    @property
    def label(self) -> str:
        """The text alternative, for screen readers."""
        told = []
        for line in self.lines:
            values = [short(value) for _, value in line.points if math.isfinite(value)]
            told.append(f"{line.name} {', '.join(values) if self.marker else f'from {values[0]} to {values[-1]}'}")
        return f"{self.title}: {'; '.join(told)}"


def short(number: float, digits: int = 4) -> str:
    """As few digits as tell it: 12,000, 0.25, 5e-06."""
    return f"{number:,.0f}" if 1000 <= abs(number) < math.inf else f"{number:.{digits}g}"


# ---------------------------------------------------------------------------------------------------------------------
# Of a run


def of_training(
    training: list[dict], evaluations: list[dict], undistilled: Sequence[dict] = (), teacher: float | None = None
) -> list[Chart]:
    """Loss, accuracy, learning rate and throughput, as far as metrics.jsonl has figures for them.

    training, evaluations: its lines of either kind. undistilled: the evaluations of the comparison run. teacher: its
    top-1, drawn as a line to reach.
    """
    accuracies = _accuracies(evaluations, undistilled, teacher)
    highest = max((value for line in accuracies for _, value in line.points), default=0)
    charts = [
        Chart("Training loss", _losses(training)),
        Chart("Validation top-1", accuracies, "%", high=100 if highest > 90 else None),
        Chart("Learning rate", _line("learning rate", training, "lr"), low=0),
        Chart("Throughput", _line("throughput", training, "images_per_s"), "images/s", low=0),
    ]
    return [chart for chart in charts if chart.lines]


def of_tokens(similarity: list[float]) -> Chart:
    """Cosine similarity of class and distillation token at the input and after each block."""
    line = Line("cosine similarity", list(enumerate(similarity)), "c1")
    return Chart(
        "Class and distillation token", [line], "cosine similarity", low=min(0, *similarity), high=1,
        x_label="block (0: input)", marker="o",
    )  # fmt: skip


def _line(name: str, lines: Iterable[dict], key: str, color: str = "c1") -> list[Line]:
    """[] without a finite value other than 0, which is written for a term that a run does not have."""
    points = [(line["step"], math.nan if line[key] is None else float(line[key])) for line in lines if key in line]
    return [Line(name, points, color)] if any(math.isfinite(value) and value for _, value in points) else []


def _losses(training: list[dict]) -> list[Line]:
    terms = [
        *_line("class term", training, "class_loss", "c1"),
        *_line("teacher term", training, "teacher_loss", "c2"),
        *_line("attention term", training, "attention_loss", "c4"),
        *_line("feature term", training, "feature_loss", "grey"),
    ]
    return [*_line("loss", training, "loss", "c3"), *terms] if len(terms) > 1 else _line("loss", training, "loss")


def _accuracies(evaluations: list[dict], undistilled: Sequence[dict], teacher: float | None) -> list[Line]:
    def top1(lines: Sequence[dict], source: str, head: str) -> list[Point]:
        return [(line["step"], 100 * line[source][head]) for line in lines if head in line.get(source, {})]

    lines = [
        Line(name + suffix, top1(evaluations, source, head), color, dash)
        for source, suffix, dash in (("model", "", "-"), ("ema", ", moving average", "--"))
        for (head, name), color in zip(HEADS.items(), ("c1", "c2", "c3"))
    ]
    twin = [top1(undistilled, "model", head) for head in HEADS]
    lines.append(Line("not distilled", next(filter(None, reversed(twin)), []), "grey"))
    lines = [line for line in lines if line.points]
    if teacher is not None and lines:
        ends = lines[0].points[0][0], lines[0].points[-1][0]
        lines.append(Line("teacher", [(step, 100 * teacher) for step in ends], "grey", ":"))
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def plot(axis: Axes, chart: Chart) -> None:
    for line in reversed(chart.lines):
        x, y = thin(line.points)
        shown = np.isfinite(y)
        alone = shown & ~np.r_[False, shown[:-1]] & ~np.r_[shown[1:], False]  # no line leads to or from these
        axis.plot(
            x, y, line.dash, color=COLORS[line.color], linewidth=1.6, marker="o", markersize=5,
            markevery=None if chart.marker else alone, clip_on=False,
        )  # fmt: skip
    xs = [x for line in chart.lines for x, _ in line.points]
    axis.update_datalim([(xs[0], value) for value in (chart.low, chart.high) if value is not None])
    axis.set_ymargin(0)
    axis.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    with rc_context({"axes.autolimit_mode": "round_numbers"}):  # the ticks enclose the values
        axis.set_ylim(axis.get_ylim())
    axis.yaxis.set_major_formatter(lambda value, _: short(round(value, 12)))
    axis.set_xlim(min(0, *xs), max(1, *xs))  # it ends where the data does, wherever the last tick is
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axis.xaxis.set_major_formatter(lambda value, _: short(value))
    axis.set_xlabel(chart.x_label, loc="right", color=COLORS["soft"])
    axis.grid(axis="y", color=COLORS["rule"])
    axis.tick_params(color=COLORS["grey"], labelcolor=COLORS["soft"])
    axis.tick_params(axis="y", length=0)
    axis.spines[["left", "top", "right"]].set_visible(False)
    axis.spines["bottom"].set_color(COLORS["grey"])


def png(path: Path, shown: list[Chart]) -> None:
    """The charts beside each other and in rows, with their titles and legends."""
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / max(columns, 1))
    figure = Figure(figsize=(6 * columns or 1, 4 * rows or 1), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    for position, chart in enumerate(shown, 1):
        axis = figure.add_subplot(rows, columns, position)
        plot(axis, chart)
        axis.set_title(f"{chart.title}, {chart.unit}" if chart.unit else chart.title)
        if len(chart.lines) > 1:
            lines = [Line2D([], [], color=COLORS[line.color], linestyle=line.dash) for line in chart.legend]
            axis.legend(lines, [line.name for line in chart.legend], fontsize=8)
    figure.savefig(path, dpi=100)


def svg(chart: Chart) -> str:
    """The chart as an element for a page, without title and legend. Colours are var(--NAME) of COLORS; text has no
    font: both are the style sheet's."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.size": 12, "path.simplify": False}):
        figure = Figure(figsize=[side / 72 for side in SIZE], layout="constrained")
        axis = figure.subplots()
        plot(axis, chart)
        figure.patch.set_visible(False)
        axis.patch.set_visible(False)
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
    drawn = re.sub(r"<defs>\s*<style.*?</defs>|<!--.*?-->|font-family: [^;]*; ", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r' id="[\w.]+_\d+"| transform="rotate\(-?0 [^"]*"', "", drawn)
    names = {color: name for name, color in COLORS.items()}
    drawn = re.sub("|".join(names), lambda found: f"var(--{names[found[0]]})", drawn)
    return f'<svg viewBox="0 0 {SIZE[0]} {SIZE[1]}" role="img" aria-label="{escape(chart.label)}">{drawn}'


def thin(points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
    """x and y of at most POINTS points, each the mean of neighbours; nan where none of them is finite."""
    xy = np.array(points, dtype=float)
    xy[~np.isfinite(xy)] = np.nan
    size = math.ceil(len(xy) / POINTS)
    padded = np.full((-len(xy) % size, 2), np.nan)
    groups = np.concatenate([xy, padded]).reshape(-1, size, 2)
    counts = np.isfinite(groups).sum(1)
    return tuple((np.nansum(groups, 1) / np.where(counts, counts, np.nan)).T)
