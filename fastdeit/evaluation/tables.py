"""Tables for the terminal."""

import shutil

from rich.console import Console
from rich.table import Column, Table

from fastdeit.models.heads import HEADS

NAMES = {"teacher": "teacher", **HEADS, "undistilled": "same student, not distilled"}


def _render(table: Table) -> str:
    """The table in a frame; without one, and its names folded, where the terminal is too narrow for that."""
    width = shutil.get_terminal_size((100, 24)).columns
    console = Console(width=width, highlight=False, force_jupyter=False)  # text in a notebook, too
    if console.measure(table, options=console.options.update(max_width=1000)).maximum > console.width:
        table.box, table.pad_edge = None, False
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def accuracy_table(result: dict[str, dict]) -> str:
    """`result`: {"model" or "ema": {head: {"top1", "top5", "loss", "ece"}}}."""
    figures = (Column(name, no_wrap=True) for name in ("top-1 %", "top-5 %", "loss", "ECE %"))
    table = Table("weights", "head", *figures)
    for source, heads in result.items():
        for head, value in heads.items():
            figures = (
                f"{100 * value['top1']:.2f}",
                f"{100 * value['top5']:.2f}",
                f"{value['loss']:.4f}",
                f"{100 * value['ece']:.2f}",
            )
            table.add_row({"model": "trained", "ema": "moving average"}[source], NAMES[head], *figures)
    return _render(table)


def summary_table(summary: dict[str, float]) -> str:
    """`summary`: top-1 as a fraction for some of the keys of NAMES."""
    table = Table("", "top-1 %")
    for key, name in NAMES.items():
        if key in summary:
            table.add_row(name, f"{100 * summary[key]:.2f}")
    return _render(table)
