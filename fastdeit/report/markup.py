"""HTML, escaped unless it is known to be markup, and numbers as the page writes them."""

import math
from datetime import datetime
from html import escape


class Html(str):
    """Text that is markup. Every other string is escaped when it becomes part of an element."""


EMPTY = {"img", "meta", "br"}  # elements without content and end


def el(name: str, /, *content, **attributes) -> Html:
    """The element `name`. content: Html, other values (their text), lists of both; None is left out.

    attributes: `class_` is class, `_` is `-` elsewhere; None is left out, True is an attribute without a value.
    """
    head = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is not None:
            head.append(key if value is True else f'{key}="{escape(str(value))}"')
    if name in EMPTY:
        return Html(f"<{' '.join(head)}>")
    return Html(f"<{' '.join(head)}>{join(content)}</{name}>")


def join(content) -> Html:
    """The elements of an iterable one after the other."""
    return Html("".join(_text(part) for part in content))


def _text(part) -> str:
    if part is None:
        return ""
    if isinstance(part, Html):
        return part
    if isinstance(part, (list, tuple)):
        return join(part)
    return escape(str(part))


def table(head: list, rows: list[list], *, caption: str | None = None, class_: str | None = None) -> Html:
    """The first cell of a row is its header. A row may be a finished element."""
    heads = [el("th", cell, scope="col") for cell in head]
    body = [row if isinstance(row, Html) else table_row(row) for row in rows]
    return el(
        "table",
        el("caption", caption) if caption else None,
        el("thead", el("tr", heads)) if head else None,
        el("tbody", body),
        class_=class_,
    )


def table_row(cells: list, class_: str | None = None) -> Html:
    first, *others = cells
    return el("tr", el("th", first, scope="row"), [el("td", cell) for cell in others], class_=class_)


def percent(share: float | None, digits: int = 2) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}"


def duration(seconds: float) -> str:
    """3.4 s, 2 min 05 s, 7 h 03 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def moment(seconds: float) -> Html:
    """A time of the clock in the local zone; seconds since 1970."""
    when = datetime.fromtimestamp(seconds).astimezone()
    return el("time", f"{when.day} {when:%B %Y, %H:%M}", datetime=when.isoformat(timespec="seconds"))


def short(number: float) -> str:
    """As few digits as tell it: 12,000, 0.25, 5e-06."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    if abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:.4g}"


def count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"
