"""The page for people."""

import shutil
import textwrap
from collections.abc import Iterable

from .checks import Result, to_install

NAME = 32  # columns
ALL_WELL = "all that training needs works here"


def of_machine(facts: dict) -> str:
    lines = ["machine"]
    lines += [_line(name, value) for name, value in facts["system"].items()]
    gpus = [", ".join(f"{value}" for value in gpu.values()) for gpu in facts["GPU"]]
    lines += [_line(f"GPU {number}", text) for number, text in enumerate(gpus)] or [_line("GPU", "none (nvidia-smi)")]
    lines += ["", "versions"]
    lines.append(_wrapped(", ".join(f"{name} {version}" for name, version in facts["versions"].items()), 2))
    if facts["environment"]:
        lines += ["", "environment"]
        lines += [_line(name, value) for name, value in facts["environment"].items()]
    return "\n".join([*lines, ""])


def of_checks(found: Iterable[Result]) -> str:
    found, lines, section = list(found), [], None
    for one in found:
        if one.section != section:
            lines += ([""] if lines else []) + [one.section]
            section = one.section
        loud = one.breaks_training or one.outcome == "fails"
        lines.append(_line(one.name, f"{one.outcome.upper() if loud else one.outcome:8} {one.detail}", hang=9))
    if install := to_install(found):
        lines += ["", "to install what is missing, where you want it:", *(f"    {line}" for line in install)]
    broken = ", ".join(one.name for one in found if one.breaks_training)
    return "\n".join([*lines, "", f"training needs what is broken: {broken}" if broken else ALL_WELL])


def _line(name: str, value: str, hang: int = 0) -> str:
    return _wrapped(f"{name:{NAME - 2}}{value}", 2, NAME + hang)


def _wrapped(text: str, indent: int, hang: int | None = None) -> str:
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    return textwrap.fill(
        text, width, initial_indent=" " * indent, subsequent_indent=" " * (indent if hang is None else hang),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
