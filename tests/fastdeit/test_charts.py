"""The curves of a run: drawn lines are read back from the SVG by the ticks of its axes, and compared with the log."""

import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from fastdeit.checkpoint import metrics_log
from fastdeit.evaluation import plots
from fastdeit.evaluation.charts import COLORS, POINTS, Chart, Line, of_tokens, of_training, short, svg, thin

NUMBER = r"-?[\d.]+(?:e-?\d+)?"
COLOR = {color: name for name, color in COLORS.items()}


def read(drawing: str) -> dict[tuple[str, bool], np.ndarray]:
    """{(colour, is dashed or dotted): (points, 2)} of the curves in an SVG, in the axes' units; a row of nan between
    pieces."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none;([^"]*)"', drawing)
    labels = {
        anchor: [
            (float(x), float(text.replace(",", "")))
            for x, text in re.findall(rf'anchor: {anchor}[^"]*" x="({NUMBER})" [^>]*>({NUMBER}|[\d,]+)<', drawing)
        ]
        for anchor in ("middle", "end")
    }
    grid = [float(path.split()[2]) for path, style in paths if "var(--rule)" in style]
    assert len(grid) == len(labels["end"]), "a line of the grid for each label"
    across = np.polyfit(*zip(*labels["middle"]), 1)
    up = np.polyfit(grid, [value for _, value in labels["end"]], 1)
    curves = {}
    for path, style in paths:
        if "stroke-width: 1.6" in style:
            rows = []
            for letter, x, y in re.findall(rf"([ML]) ({NUMBER}) ({NUMBER})", path):
                rows += [[math.nan, math.nan]] * (letter == "M" and bool(rows)) + [[float(x), float(y)]]
            x, y = np.array(rows).T
            curve = np.stack([np.polyval(across, x), np.polyval(up, y)], axis=1)
            curves[re.search(r"stroke: var\(--(\w+)\)", style)[1], "dasharray" in style] = curve
    return curves


def train_line(step: int, **figures) -> dict:
    return {"kind": "train", "step": step, "epoch": 0, "teacher_loss": 0.0, "lr": 1e-3, "images_per_s": 100, **figures}


def eval_line(step: int, top1: float) -> dict:
    heads = {"cls": top1, "dist": top1 / 2, "both": top1 / 4}
    return {"kind": "eval", "step": step, "epoch": 0, "model": heads, "ema": {k: v / 8 for k, v in heads.items()}}


def test_what_is_drawn_is_what_was_logged():
    training = [
        train_line(
            10 * i,
            loss=7 / i,
            class_loss=8 / i,
            teacher_loss=6 / i,
            attention_loss=1 / i,
            feature_loss=2 / i,
            lr=3e-4 / i,
        )
        for i in range(1, 8)
    ]
    evaluations = [eval_line(35, 0.5), eval_line(70, 0.72)]
    loss, top1, rate, speed = of_training(
        training, evaluations, [eval_line(70, 0.4), eval_line(90, 0.44)], teacher=0.85
    )
    for chart, color, key in (
        (loss, "c3", "loss"), (loss, "c1", "class_loss"), (loss, "c2", "teacher_loss"),
        (loss, "c4", "attention_loss"), (loss, "grey", "feature_loss"),
        (rate, "c1", "lr"), (speed, "c1", "images_per_s"),
    ):  # fmt: skip
        expected = [(line["step"], line[key]) for line in training]
        assert read(svg(chart))[color, False] == pytest.approx(np.array(expected), rel=1e-3, abs=1e-6), key
    curves = read(svg(top1))
    for (color, dashed), values in {
        ("c1", False): (50, 72), ("c2", False): (25, 36), ("c3", False): (12.5, 18),
        ("c1", True): (6.25, 9), ("c2", True): (3.125, 4.5), ("c3", True): (1.5625, 2.25), ("grey", True): (85, 85),
    }.items():  # fmt: skip
        assert curves[color, dashed] == pytest.approx(np.array([(35, values[0]), (70, values[1])]), abs=0.02)
    assert curves["grey", False] == pytest.approx(np.array([(70, 10), (90, 11)]), abs=0.02)  # both heads of the twin
    assert [line.name for line in top1.legend][-3:] == ["not distilled", "teacher", "moving average"]


def test_a_term_alone_is_the_loss():
    (loss, *_) = of_training([train_line(1, loss=2.0, class_loss=2.0)], [])
    assert [line.name for line in loss.lines] == ["loss"]
    assert of_training([], []) == []


def test_gaps():
    values = [1, 2, math.nan, 4, math.inf, 3, 2, 1]
    training = [train_line(i, loss=value) for i, value in enumerate(values)]
    drawing = svg(of_training(training, [])[0])
    curve = read(drawing)["c1", False]
    assert np.isnan(curve[:, 1]).tolist() == [False, False, True, False, True, False, False, False]
    assert drawing.count("<use") - drawing.count('y="211.99') == 1  # a dot at 4, to which no line leads
    assert "loss from 1 to 1" in drawing


def test_one_point_and_none():
    chart = of_training([train_line(3, loss=2.5), train_line(4, loss=None)], [])[0]
    assert read(svg(chart))["c1", False] == pytest.approx(np.array([(3, 2.5)]), abs=0.01)
    assert [chart.title for chart in of_training([train_line(1, loss=math.nan)], [])] == ["Learning rate", "Throughput"]


def test_long_lines_are_averaged():
    points = [(float(i), float(i % 2)) for i in range(10_001)]
    x, y = thin(points)
    assert len(x) <= POINTS and y == pytest.approx(np.full(len(y), 0.5), abs=0.04)
    assert x[0] == np.mean(range(26)) and x[-1] == np.mean(range(26 * 384, 10_001))
    assert np.array_equal(np.stack(thin(points[:POINTS]), 1), points[:POINTS])
    with_gaps = [(x, math.nan if x < 60 or x % 2 else 5.0) for x, _ in points]
    y = thin(with_gaps)[1]
    assert np.isnan(y[:2]).all() and (y[2:] == 5).all()


@pytest.mark.parametrize("low, high", [(0, 1), (-0.3, 17), (98.61, 99.44), (2e-6, 2e-3), (5, 5), (0, 0), (0, 375_300)])
def test_ticks_enclose_the_values(low, high):
    drawing = svg(Chart("chart", [Line("line", [(0, low), (1, high)], "c1")]))
    labels = re.findall(rf"anchor: end[^>]*>({NUMBER}|[\d,]+)<", drawing)
    ticks = [float(label.replace(",", "")) for label in labels]
    assert ticks[0] <= low and ticks[-1] >= high and 3 <= len(ticks) <= 9
    steps = np.diff(ticks)
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert f"{steps[0]:.6e}"[0] in "125"
    assert read(drawing)["c1", False][:, 1] == pytest.approx([low, high], abs=2e-4 * (ticks[-1] - ticks[0]))


def test_the_axis_goes_as_far_as_it_is_told():
    drawing = svg(of_tokens([0.1, 0.4, 0.9]))
    labels = re.findall(rf"anchor: end[^>]*>({NUMBER})<", drawing)
    assert float(labels[0]) == 0 and float(labels[-1]) == 1
    assert "cosine similarity 0.1, 0.4, 0.9" in drawing


def test_colours_are_the_pages():
    drawing = svg(Chart("<&>", [Line("line", [(0, 1), (1, 2)], name) for name in COLORS]))
    assert not re.findall(r"#[0-9a-f]{6}\b", drawing) and {f"var(--{name})" in drawing for name in COLORS} == {True}
    assert "font-family" not in drawing and "<style" not in drawing and 'aria-label="&lt;&amp;&gt;: ' in drawing


def test_curves_png(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [train_line(i, loss=math.nan if i == 3 else 9.0 - i) for i in range(1, 6)] + [eval_line(5, 0.3)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "tr')
    plots.curves(tmp_path)
    with Image.open(tmp_path / "curves.png") as image:
        colors = {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b, *_) in image.getcolors(1 << 20)}
    assert {COLORS["c1"], COLORS["c2"], COLORS["c3"]} <= colors


def test_a_log_that_was_resumed_is_read_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [train_line(step, loss=loss) for step, loss in ((10, 1), (20, 2), (30, 3), (20, 4), (40, 5))]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    training, evaluations = metrics_log.read(path)
    assert [(line["step"], line["loss"]) for line in training] == [(10, 1), (20, 4), (30, 3), (40, 5)]
    assert evaluations == [] and metrics_log.read(tmp_path / "none.jsonl") == ([], [])


def test_numbers():
    assert [short(n) for n in (12000, 0.25, 5e-6, 0, 999.96, math.nan, math.inf)] == [
        "12,000", "0.25", "5e-06", "0", "1000", "nan", "inf",
    ]  # fmt: skip
