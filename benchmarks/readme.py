"""Brings the tables of README.md and docs up to date with the records.

    python -m benchmarks.readme              writes them
    python -m benchmarks.readme --check      exits with 1 when they are stale

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is one of TABLES.
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from fastdeit.cli import FoldedHelp

from . import cost_to_accuracy, data_efficiency, demo
from .record import RECORDS, Headline

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "distillation.md", ROOT / "docs" / "training.md")
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def speed() -> str:
    """The headlines of every device's records, GPUs first."""
    folders = sorted(
        (folder for folder in RECORDS.iterdir() if folder.is_dir()), key=lambda f: (f.name == "cpu", f.name)
    )
    parts = [part for folder in folders if (part := _device(folder))]
    return "\n".join(parts)


def _device(folder: Path) -> str:
    rows = []
    for file in sorted(folder.glob("*.json")):
        for fields in json.loads(file.read_text()).get("headlines", []):
            headline = Headline(**fields)
            share = "" if headline.floor_share is None else f"{100 * headline.floor_share:.0f} %"
            link = f"[{headline.what}](benchmarks/records/{folder.name}/{file.stem}.csv)"
            rows.append([link, headline.ours, f"{headline.theirs} ({headline.peer})", f"{headline.ratio:.2f} x", share])
    if not rows:
        return ""
    columns = [f"on {folder.name}", "fastdeit", "fastest peer", "speed-up", "of the floor"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return _markdown(columns, rows)


def what_distillation_is_worth() -> str:
    """In the demo, in a sentence."""
    return textwrap.fill(demo.in_words(demo.read()), 120) + "\n"


def study(module: ModuleType) -> str:
    """The table of one of the studies on Fashion-MNIST, and what it shows."""
    results = module.Results(RECORDS / "cpu" / f"{module.__name__.rpartition('.')[2]}.csv")
    return f"{textwrap.fill(results.in_words(), 120)}\n\n{results.table()}"


TABLES = {
    "speed": speed,
    "demo": what_distillation_is_worth,
    "study": partial(study, data_efficiency),
    "costs": partial(study, cost_to_accuracy),
}


def up_to_date(text: str) -> str:
    """A page's text with every table as the records have it."""
    return PLACE.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FoldedHelp)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 when something is stale")
    arguments = parser.parse_args()
    fresh = {page: up_to_date(page.read_text()) for page in PAGES}
    stale = [page for page in PAGES if page.read_text() != fresh[page]]
    for page in stale:
        if arguments.check:
            print(f"{page.name} is not what the records say: python -m benchmarks.readme", file=sys.stderr)
        else:
            page.write_text(fresh[page])
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
