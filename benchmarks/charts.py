"""The charts of the records."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .timing import Ceilings

if TYPE_CHECKING:
    from .kernel_table import Row


def times_ours(rows: Sequence["Row"], path: Path) -> None:
    """A bar for each contender and case: its time over ours."""
    cases = list(dict.fromkeys((row.operation, row.case) for row in rows))
    names = list(dict.fromkeys(row.contender for row in rows))
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(rows)), layout="constrained")
    for k, name in enumerate(names):
        points = {(row.operation, row.case): row.times_ours for row in rows if row.contender == name}
        heights = [cases.index(case) + k / (len(names) + 1) for case in points]
        axes.barh(heights, points.values(), 0.8 / len(names), label=name)
    axes.set_yticks([i + 0.3 for i in range(len(cases))], [", ".join(case) for case in cases], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set_xlabel("time over ours")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def roofline(rows: Sequence["Row"], ceilings: Ceilings, path: Path) -> None:
    """FLOP/s reached over the FLOP a byte that the task needs at least, under the two ceilings as measured."""
    rows = [row for row in rows if row.work[1]]
    intensities = [row.work[1] / row.work[0] for row in rows]
    ridge = ceilings.matmul / ceilings.bandwidth
    left, right = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.plot([left, ridge, right], [left * ceilings.bandwidth / 1e12, *2 * [ceilings.matmul / 1e12]], color="black")
    axes.text(
        left, left * ceilings.bandwidth / 1e12, f"  copy: {ceilings.bandwidth / 1e12:.2f} TB/s", fontsize=8, va="top"
    )
    axes.text(
        right,
        ceilings.matmul / 1e12,
        f"matmul: {ceilings.matmul / 1e12:.0f} TFLOP/s",
        fontsize=8,
        ha="right",
        va="bottom",
    )
    for k, name in enumerate(dict.fromkeys(row.contender for row in rows)):
        points = [
            (i, row.work[1] / row.timing.median / 1e6) for i, row in zip(intensities, rows) if row.contender == name
        ]
        axes.scatter(*zip(*points), s=18 if k else 40, marker="o" if k else "*", label=name, zorder=3 - bool(k))
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte, at least", ylabel="TFLOP/s")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def waterfall(steps: Mapping[str, float], title: str, unit: str, path: Path) -> None:
    """One bar for each technique, added to those above it: what the step takes, and beside it by how much it fell."""
    names, values = list(steps), list(steps.values())
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(names) + 1.2), layout="constrained")
    axes.barh(names, values, color=["0.75", *("C0" if b < a else "C3" for a, b in pairwise(values))])
    for i, value in enumerate(values):
        change = f"   {100 * (value / values[i - 1] - 1):+.0f} %" if i else ""
        axes.text(value, i, f" {value:.4g} {unit}{change}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set(title=title, xlabel=unit)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def shares(totals: Mapping[str, float], floor: str, title: str, unit: str, path: Path) -> None:
    """A bar for each total, of which the part that `floor` takes too is grey."""
    names, least = list(totals), totals[floor]
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(names) + 1.2), layout="constrained")
    axes.barh(names, [min(least, total) for total in totals.values()], color="0.75", label=floor)
    rest = [max(0.0, total - least) for total in totals.values()]
    bars = axes.barh(names, rest, left=least, color="C1", label="on top of it")
    axes.bar_label(bars, labels=[f"{total:.4g} {unit}" for total in totals.values()], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(title=title, xlabel=unit)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def bars(columns: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """A plot for each column, side by side, with a bar for each of its values; those called fastdeit stand out."""
    names = list(next(iter(columns.values())))
    size = (5 * len(columns), 0.4 * len(names) + 1)
    figure, many = plt.subplots(1, len(columns), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, (title, values) in zip(many[0], columns.items()):
        drawn = axes.barh(names, values.values(), color=["C1" if "fastdeit" in name else "C0" for name in names])
        axes.bar_label(drawn, fmt="%.4g", padding=3, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.15)
    many[0][0].invert_yaxis()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def accuracy_over_images(lines: Mapping[str, Mapping[int, Sequence[float]]], path: Path) -> None:
    """A line a method: mean top-1 in per cent over the number of training images, with a mark for each seed."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for k, (method, values) in enumerate(lines.items()):
        means = {size: sum(tops) / len(tops) for size, tops in values.items() if tops}
        axes.plot(means.keys(), means.values(), color=f"C{k}", label=method)
        for size in means:
            axes.plot([size] * len(values[size]), values[size], ".", color=f"C{k}", alpha=0.6)
    sizes = sorted({size for values in lines.values() for size in values})
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set(xlabel="training images", ylabel="top-1 %, test images")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def accuracy_over_cost(
    levers: Mapping[str, Sequence[Sequence[tuple[float, float, float]]]], targets: Sequence[float], path: Path
) -> None:
    """Top-1 over images and over CPU-seconds, side by side. levers: of each the runs, of each (images, CPU-seconds,
    top-1 in per cent) at its evaluations. A line is the mean over the runs, evaluation by evaluation; thin ones are the
    runs."""
    figure, both = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True, layout="constrained")
    for axes, column, label in zip(both, (0, 1), ("training images seen", "CPU-seconds of training")):
        for k, (lever, runs) in enumerate(levers.items()):
            style = {"color": "black" if k == 0 else f"C{k - 1}", "linestyle": "-" if k <= 10 else "--"}
            drawn = [list(zip(*points)) for points in runs]  # columns
            means = list(zip(*([sum(values) / len(runs) for values in zip(*at)] for at in zip(*runs))))
            for columns in drawn:
                axes.plot(columns[column], columns[2], **style, lw=0.5, alpha=0.5)
            axes.plot(means[column], means[2], **style, lw=1.8, label=lever)
        for target in targets:
            axes.axhline(target, color="0.5", linewidth=0.8, linestyle=":")
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    scores = [point[2] for runs in levers.values() for points in runs for point in points]
    both[0].set(ylabel="top-1 %, held-out images", ylim=(max(min(scores), min(targets) - 15), max(scores) + 1))
    figure.legend(*both[1].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=110)
    plt.close(figure)
