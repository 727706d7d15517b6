"""metrics.jsonl, read again: by the curves, the report, and a run that is resumed."""

import json
from contextlib import suppress
from pathlib import Path


def read(path: Path) -> tuple[list[dict], list[dict]]:
    """The training figures and the evaluations of a metrics.jsonl, each in the order of their steps; of lines about
    the same step the last one, which a resumed run wrote. Figures may be nan."""
    found = {"train": {}, "eval": {}}
    for line in json_lines(path):
        found[line["kind"]][line["step"]] = line
    return tuple([lines[step] for step in sorted(lines)] for lines in found.values())


def json_lines(path: Path) -> list[dict]:
    """[] for a file that is not there; without lines cut off by a kill or a full disk, or half written now."""
    found = []
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found
