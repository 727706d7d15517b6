"""Choices as a person reads them. `table` takes what Choice.to_dict gives, or a run's tuning.json holds."""

from collections.abc import Sequence

COLUMNS = ("candidate", "ms", "ratio", "difference", "")


def table(choices: Sequence[dict]) -> str:
    """The choices that were measured or have something to say, one block each; "" where there are none."""
    return "\n\n".join(_block(choice) for choice in choices if choice["rows"] or choice["notes"])


def rows_of(choice: dict) -> list[tuple[str, ...]]:
    """For each candidate its name, median milliseconds, time over the default's, relative difference from the default,
    and "chosen", "default" or why it was excluded."""
    reference = next((row["ms"] for row in choice["rows"] if row["candidate"] == choice["default"]), None)
    return [_row(row, choice, reference) for row in choice["rows"]]


def origin_of(choice: dict) -> str:
    """Where the answer comes from, in words."""
    if choice["origin"] == "measured":
        return f"measured in {choice['seconds']:.1f} s"
    return {
        "cache": "remembered on this machine", "checkpoint": "the checkpoint's", "default": "not measured",
    }[choice["origin"]]  # fmt: skip


def about(choice: dict) -> str:
    """What the answer depends on beside the machine."""
    return ", ".join(_said(name, value) for name, value in choice["key"].items() if value not in (None, False, ""))


def _said(name: str, value) -> str:
    if value is True:
        return name
    if isinstance(value, list):
        return "x".join(map(str, value))
    if isinstance(value, dict):
        return f"{name} {' + '.join(key if one is True else str(one) for key, one in value.items() if one)}"
    return str(value) if isinstance(value, str) else f"{name} {value}"


def _block(choice: dict) -> str:
    lines = [f"{choice['question']}: {choice['chosen']} ({origin_of(choice)}; {about(choice)})"]
    lines += [f"  {note}" for note in choice["notes"]]
    if not choice["rows"]:
        return "\n".join(lines)
    rows = [COLUMNS, *rows_of(choice)]
    first, *others = (max(len(row[i]) for row in rows) for i in range(4))
    for row in rows:
        figures = "  ".join(cell.rjust(width) for cell, width in zip(row[1:4], others))
        lines.append(f"  {row[0].ljust(first)}  {figures}  {row[4]}".rstrip())
    return "\n".join(lines)


def _row(row: dict, choice: dict, reference: float | None) -> tuple[str, ...]:
    ms = row["ms"]
    figures = (
        f"{ms:.3f}" if ms is not None else "-",
        f"{ms / reference:.2f}" if ms is not None and reference else "-",
        f"{row['error']:.0e}" if row["error"] is not None else "-",
    )
    marks = [mark for mark in ("chosen", "default") if choice[mark] == row["candidate"]]
    return (row["candidate"], *figures, f"excluded: {row['excluded']}" if row["excluded"] else ", ".join(marks))
