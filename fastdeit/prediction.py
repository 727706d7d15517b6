"""The answer to one image, and its forms: a line to read, a line of JSON, a row of CSV."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

IMAGE_WIDTH, CLASS_WIDTH = 60, 16  # columns of the plain form; a longer name pushes the rest of its line to the right

ON_ONE_LINE = str.maketrans({"\n": "\\n", "\r": "\\r"})  # a file's name may hold anything


class Prediction(NamedTuple):
    image: str  # as it was named or found
    classes: list[tuple[str, float]]  # (name, probability), the most probable first; none if it could not be read
    error: str | None = None  # why it could not be read


# Each form gives a line, or None where it has none for an image that could not be read.


def as_line(
    images: Sequence[str], classes: Sequence[str], width: int | None = None
) -> Callable[[Prediction], str | None]:
    """The plain form, its columns as wide as these names of images and classes ask for.

    width: the longest line that is wanted; classes behind the first give way to it
    """
    image_width = min(max(map(len, images)), IMAGE_WIDTH)
    class_width = min(max(map(len, classes)), CLASS_WIDTH)

    def form(answer: Prediction) -> str | None:
        if answer.error is not None:
            return None
        cells = [f"{name:<{class_width}} {100 * p:5.1f} %" for name, p in answer.classes]
        line, *others = [f"{answer.image.translate(ON_ONE_LINE):<{image_width}}  {cells[0]}", *cells[1:]]
        for cell in others:
            if width is not None and len(line) + 2 + len(cell) > width:
                break
            line += f"  {cell}"
        return line

    return form


def as_json(answer: Prediction) -> str:
    """{"image": ..., "classes": [{"class": ..., "probability": ...}, ...]} or {"image": ..., "error": ...}"""
    if answer.error is not None:
        return json.dumps({"image": answer.image, "error": answer.error})
    classes = [{"class": name, "probability": _rounded(p)} for name, p in answer.classes]
    return json.dumps({"image": answer.image, "classes": classes})


def csv_header(top: int) -> str:
    return _csv_line(["image", *(f"{column}_{i}" for i in range(1, top + 1) for column in ("class", "probability"))])


def as_csv(answer: Prediction) -> str | None:
    if answer.error is not None:
        return None
    return _csv_line([answer.image, *(cell for name, p in answer.classes for cell in (name, _rounded(p)))])


def _csv_line(cells: Sequence) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()


def _rounded(probability: float) -> float:
    """To six significant digits, which is about what float32 knows."""
    return float(f"{probability:.6g}")
