"""The page as one document."""

from pathlib import Path

from ..command import in_words
from .head import head
from .markup import Html, el, join
from .record import Record
from .sections import sections
from .settings import differences, recipe_settings


def page(record: Record) -> str:
    """The whole document, in one string."""
    drawn, reason = _draw(record)
    recipe = recipe_settings(record.settings)
    changed = differences(record.settings, recipe)
    title = record.folder.resolve().name
    body = join(
        [
            el("header", *head(record, title, drawn, changed, recipe)),
            el("main", *sections(record, drawn, reason, changed, recipe)),
            el("footer", f"Written by fastdeit from {record.folder.resolve()}."),
        ]
    )
    top = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{title} · fastdeit"),
        el("style", Html(Path(__file__).with_name("style.css").read_text())),
    )
    return f"<!DOCTYPE html>\n{el('html', top, el('body', body), lang='en')}\n"


def _draw(record: Record):
    """(Looks, None), or (None, the sentence that says why there are none)."""
    from . import pictures

    if not record.description:
        return None, "there is no checkpoint"
    try:
        return pictures.look(record.folder, record.settings), None
    except pictures.NotDrawn as error:
        return None, str(error)
    except Exception as error:
        words = in_words(error)
        if words is None:
            raise
        return None, words
