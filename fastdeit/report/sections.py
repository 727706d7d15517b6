"""The sections below the head: what each shows, and what it says when there is nothing to show."""

from ..tables import NAMES
from .curves import HEADS, curves, similarity_figure, time_notes, time_spent
from .markup import Html, count, el, percent, table, table_row
from .record import Record
from .settings import written

LISTED = 20  # bad files and steps that are named one by one


def sections(record: Record, drawn, reason: str | None, changed: dict, recipe: dict | None) -> list[Html]:
    figures = curves(record, record.summary.get("teacher"))
    spent = time_spent(record)
    return [
        _section("Curves", el("div", figures, class_="grid") if figures else _missing("The log holds no figures yet.")),
        _section("Accuracy", *_accuracy(record, drawn)),
        _section(
            "Where the time went",
            *((spent, el("p", time_notes(record), class_="note")) if spent else (_missing("The log holds no times."),)),
        ),
        _section("First batch", *_first_batch(record)),
        _section("What the tokens look at", *_looks(record, drawn, reason)),
        _section("Trouble", *_trouble(record)),
        _section("Settings", _settings(record, changed, recipe)),
    ]


def _section(title: str, *content) -> Html:
    return el("section", el("h2", title), *content)


def _missing(sentence: str) -> Html:
    return el("p", sentence, class_="note")


def _accuracy(record: Record, drawn) -> list[Html]:
    if not record.evaluations:
        return [_missing("Nothing has been evaluated yet: that happens after each epoch.")]
    groups = _accuracy_rows(record)
    last = record.evaluations[-1]["epoch"] + 1
    head = [f"after epoch {last}", "top-1, %", "top-5, %", "cross entropy", "ECE, %", "best top-1, %", "in epoch"]
    known = [i for i in range(len(head)) if any(row[i] != "–" for rows in groups.values() for row in rows)]
    rows = []
    for name, members in groups.items():
        rows += [_group(name, len(known)), *[[row[i] for i in known] for row in members]]
    notes = []
    if 4 in known:
        notes.append("ECE: expected calibration error, the mean distance between confidence and accuracy.")
    if drawn is not None:
        notes.append(f"One validation image is {100 / drawn.images:.2g} %.")
    return [
        el("div", table([head[i] for i in known], rows, class_="figures"), class_="scroll"),
        el("p", " ".join(notes), class_="note"),
    ]


def _accuracy_rows(record: Record) -> dict[str, list[list[str]]]:
    """By their title. Cells: name, top-1, top-5, cross entropy, ECE, best top-1, its epoch; – where it is not known."""
    groups = {
        {"model": "trained weights", "ema": "their moving average"}[source]: [
            [HEADS[head], *_figures(value), *_best(record, source, head)] for head, value in heads.items()
        ]
        for source, heads in record.accuracies.items()
    }
    others = [key for key in ("undistilled", "teacher") if key in record.summary]
    if others:
        groups["for comparison"] = [[NAMES[key], percent(record.summary[key]), *5 * ["–"]] for key in others]
    return groups


def _group(name: str, columns: int) -> Html:
    return el("tr", el("th", name, colspan=columns, scope="rowgroup"), class_="group")


def _figures(value: dict) -> list[str]:
    loss = f"{value['loss']:.4f}" if "loss" in value else "–"
    return [percent(value["top1"]), percent(value.get("top5")), loss, percent(value.get("ece"))]


def _best(record: Record, source: str, head: str) -> list[str]:
    top1, epoch = record.best(source, head)
    return [percent(top1), str(epoch)]


def _first_batch(record: Record) -> list[Html]:
    from .pictures import embedded

    file = record.folder / "first_batch.png"
    if not file.is_file():
        return [_missing("first_batch.png is not in the folder.")]
    picture = el(
        "img", src=embedded(file), alt="The first augmented training images, each with its label", class_="sheet"
    )
    note = "As the student sees it: augmented, erased, mixed. A mixed image has both labels with their weights."
    return [el("figure", picture, el("figcaption", note, class_="note"))]


def _looks(record: Record, drawn, reason: str | None) -> list[Html]:
    if drawn is None:
        return [_missing(f"Not drawn: {reason}."), *_drawn_in_training(record)]
    head = [
        el("span", "image", class_="name"),
        *[el("img", src=l.image, alt=l.name, title=l.name) for l in drawn.looks],
    ]
    rows = [
        [title, *[el("img", src=l.maps[i], alt=f"{title}: {l.name}") for l in drawn.looks]]
        for i, title in enumerate(drawn.maps)
    ]
    answers = table_row([el("span", "answer, class"), *[_answer(look) for look in drawn.looks]])
    parts = [
        el("div", table([], [head, *rows, answers], class_="looks"), class_="scroll"),
        el(
            "p",
            f"{len(drawn.looks)} validation images, evenly spaced. Last block: attention of the token to each patch, "
            "averaged over the heads. Rollout: how much of each patch reaches the token through all blocks "
            "(Abnar and Zuidema, arXiv 2005.00928). Yellow is most, blue least; each map has its own scale.",
            class_="note",
        ),
    ]
    if drawn.similarity:
        parts.append(el("div", similarity_figure(drawn.similarity), _similarity_note(), class_="beside"))
    return parts


def _answer(look) -> list:
    right = look.answer == look.true
    share = f"{percent(look.probability, 0)} %"
    if right:
        return [el("b", look.answer), " ", share]
    return [el("b", look.answer, class_="wrong"), " ", share, el("br"), el("span", f"is {look.true}", class_="wrong")]


def _similarity_note() -> Html:
    return el(
        "p",
        "The two tokens start as different vectors and grow alike from block to block; where they stay below 1, the "
        "distillation token has kept something of its own. The DeiT paper (arXiv 2012.12877) reports 0.06 at the "
        "input and 0.93 after the last block.",
        class_="note",
    )


def _drawn_in_training(record: Record) -> list[Html]:
    """The similarity as the training drew it, where it cannot be drawn anew."""
    from .pictures import embedded

    file = record.folder / "token_similarity.png"
    if not file.is_file():
        return []
    alt = "Cosine similarity of class and distillation token after each block"
    return [el("figure", el("img", src=embedded(file), alt=alt, class_="sheet")), _similarity_note()]


def _trouble(record: Record) -> list[Html]:
    parts = []
    if record.bad_files:
        rows = [[name, cause] for name, cause in record.bad_files[:LISTED]]
        title = f"{count(len(record.bad_files), 'image')} could not be read"
        parts.append(
            el("div", table(["image", "cause"], rows, caption=_some(title, record.bad_files)), class_="scroll")
        )
    if record.nonfinite:
        rows = [
            [
                f"{line['step']:,}",
                "left out" if line["skipped"] else "stopped the run",
                line["gradient_norm"],
                _bad(line),
            ]
            for line in record.nonfinite[:LISTED]
        ]
        title = f"{count(len(record.nonfinite), 'step')} with a loss or gradient that is not finite"
        head = ["step", "", "gradient norm", "not finite"]
        parts.append(el("div", table(head, rows, caption=_some(title, record.nonfinite)), class_="scroll"))
    return parts or [_missing("None on record: every image could be read, every loss and gradient was finite.")]


def _some(title: str, found: list) -> str:
    return title + (f", the first {LISTED}:" if len(found) > LISTED else "")


def _bad(line: dict) -> str:
    """Terms of the loss that are written as words, as JSON has no nan."""
    terms = [
        f"{name} {value}" for rank in line["ranks"] for name, value in zip(line["terms"], rank["losses"])
        if isinstance(value, str)
    ]  # fmt: skip
    return ", ".join(dict.fromkeys(terms)) or "the gradient only"


def _settings(record: Record, changed: dict, recipe: dict | None) -> Html:
    rows = []
    for group, values in record.settings.items():
        rows.append(_group(group, 3))
        for name, value in values.items():
            differs = (group, name) in changed
            cells = [el("code", name), written(value), written(changed[group, name]) if differs else ""]
            rows.append(table_row(cells, class_="changed" if differs else None))
    number = sum(len(values) for values in record.settings.values())
    of_recipe = f", {len(changed)} other than in the recipe" if recipe else ""
    head = ["setting", "value", "in the recipe" if recipe else ""]
    return el("details", el("summary", f"All {number} settings{of_recipe}"), table(head, rows, class_="settings"))
