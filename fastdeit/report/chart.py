"""Line charts as inline SVG. Colours, line widths and fonts are the style sheet's, so they follow dark mode."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .markup import Html, el, short

WIDTH, HEIGHT = 480, 250
TOP, RIGHT, BOTTOM = 10, 12, 36
CHARACTER = 7.6  # room for a digit of the tick labels, px
POINTS = 400  # along a line: more are averaged, a line is not wider than that

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line. style: classes of the style sheet: a colour (c1 ... c6, grey), dashed, dotted, marked."""

    name: str
    points: Sequence[Point]
    style: str


def chart(series: list[Series], *, label: str, low: float | None = None, high: float | None = None,
          x_label: str = "step", tick: Callable[[float], str] = short, height: int = HEIGHT) -> Html:  # fmt: skip
    """An SVG of some lines over a common horizontal axis.

    label: what a reader who does not see it is told
    low, high: ends of the vertical axis; by default they follow the values
    """
    lines = [Series(line.name, thin(line.points), line.style) for line in series]
    xs, ys = zip(*(point for line in lines for point in line.points))
    y_ticks = ticks(min(ys) if low is None else low, max(ys) if high is None else high, 5)
    x_low, x_high = min(0, *xs), max(*xs, 1)  # it ends where the data does, wherever the last tick is
    x_ticks = [x for x in ticks(x_low, x_high, 5) if x_low <= x <= x_high]
    y_low, y_high = y_ticks[0], y_ticks[-1]
    left = 10 + CHARACTER * max(len(tick(y)) for y in y_ticks)

    def place(x: float, y: float) -> tuple[float, float]:
        across, down = (x - x_low) / (x_high - x_low), (y_high - y) / (y_high - y_low)
        return round(left + across * (WIDTH - left - RIGHT), 1), round(TOP + down * (height - TOP - BOTTOM), 1)

    floor = height - BOTTOM
    grid = [el("path", d=f"M{left} {place(x_low, y)[1]}H{WIDTH - RIGHT}", class_="tick") for y in y_ticks[1:]]
    grid.append(el("path", d=f"M{left} {floor}H{WIDTH - RIGHT}", class_="axis"))
    grid += [el("path", d=f"M{place(x, y_low)[0]} {floor}v4", class_="axis") for x in x_ticks]
    texts = [el("text", tick(y), x=left - 6, y=place(x_low, y)[1] + 4, text_anchor="end") for y in y_ticks]
    texts += [_below(short(x), place(x, y_low)[0], floor + 17) for x in x_ticks]
    texts.append(el("text", x_label, x=WIDTH - RIGHT, y=height - 4, text_anchor="end"))
    drawn = [_line([place(*point) for point in line.points], line.style) for line in reversed(lines)]
    return el("svg", grid, texts, drawn, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label)


def legend(series: list[Series]) -> Html:
    """The names of lines, each behind a piece of it."""
    return el("ul", [el("li", sample(line.style), line.name) for line in series], class_="legend")


def sample(style: str) -> Html:
    middle = el("circle", cx=12, cy=5, r=3, class_=style) if "marked" in style else None
    line = el("path", d="M1 5H23", class_=f"line {style}")
    return el("svg", line, middle, viewBox="0 0 24 10", class_="sample", aria_hidden="true")


def _below(text: str, x: float, y: float) -> Html:
    """A label in the middle under a tick; at the right edge it ends there."""
    at_edge = x + len(text) * CHARACTER / 2 > WIDTH
    return el("text", text, x=WIDTH if at_edge else x, y=y, text_anchor="end" if at_edge else "middle")


def _line(places: list[tuple[float, float]], style: str) -> list[Html]:
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
    parts = [el("path", d=path, class_=f"line {style}")]
    if len(places) == 1 or "marked" in style:
        parts += [el("circle", cx=x, cy=y, r=3, class_=style) for x, y in places]
    return parts


def thin(points: Sequence[Point]) -> list[Point]:
    """At most POINTS of them, each the mean of neighbours."""
    size = math.ceil(len(points) / POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(sum(values) / len(group) for values in zip(*group)) for group in groups]


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers a step of 1, 2 or 5 times a power of ten apart; the first and the last enclose low and high."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(math.log(factor * power / raw)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
