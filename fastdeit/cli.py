"""The command line: flags from dataclasses, recipes and resumed runs as defaults, help that reads well anywhere."""

import argparse
import ast
import dataclasses
import functools
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from fastdeit.config import Config
from fastdeit.errors import tell

# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse(kind: type, *, description: str, **options):
    """tyro.cli of a dataclass, its docstrings as paragraphs and `description` folded to the terminal's width."""
    import tyro

    _explain(kind)
    return tyro.cli(tyro.conf.OmitArgPrefixes[kind], description=_AsItIs(fold(description)), **options)


def typed_flags(arguments: Sequence[str]) -> frozenset[str]:
    """The flags of a command line, in one spelling: --no-model_ema and --model-ema=True are both --model-ema. What
    was typed outranks what a checkpoint knows; what is only a default does not."""
    flags = (argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--"))
    return frozenset(re.sub(r"^--no-", "--", flag) for flag in flags)


@functools.cache
def _explain(kind: type) -> None:
    """Give tyro each setting's docstring in one piece. From the class it would take it line by line, and begin a
    paragraph with each line that is indented, or begins with a flag. Of None as default nothing is said: the docstring
    tells what it means."""
    import tyro

    texts = _docstrings(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            _explain(field.type)
        elif field.name in texts:
            hint = _hint if field.default is None else None
            text = tyro.conf.arg(help=" ".join(texts[field.name].split()), help_behavior_hint=hint)
            kind.__annotations__[field.name] = Annotated[field.type, text]


def _hint(default: str) -> str:
    return "" if default == "None" else f"(default: {default})"


def _docstrings(kind: type) -> dict[str, str]:
    """The string below each field; none where the source is not at hand."""
    try:
        (made,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except OSError:
        return {}
    return {
        field.target.id: below.value.value
        for field, below in zip(made.body, made.body[1:])
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def fold(text: str) -> str:
    """Paragraphs filled to the terminal's width. Indented ones are command lines, which go on behind a backslash, and
    tables, whose entries go on below their text."""
    width = max(20, min(shutil.get_terminal_size().columns - 1, 119))
    folded = []
    for paragraph in re.split(r"\n\n+", text.strip("\n")):
        if re.search("^ ", paragraph, re.MULTILINE):
            folded.append("\n".join(_fold_entry(entry, width) for entry in _entries(paragraph)))
        else:
            folded.append(textwrap.fill(paragraph, width, break_on_hyphens=False))
    return "\n\n".join(folded)


def _entries(paragraph: str) -> list[str]:
    """The lines of an indented paragraph, each with what goes on below it, further to the right."""
    entries, indent = [], 0
    for line in paragraph.splitlines():
        further = len(line) - len(line.lstrip()) > indent and entries
        if further:
            entries[-1] += " " + line.strip()
        else:
            entries.append(line)
            indent = len(line) - len(line.lstrip())
    return entries


def _fold_entry(entry: str, width: int) -> str:
    """`name    what it is`, the text in a column of its own; or a command line."""
    found = re.match(r" *\S.*? {2,}(?=\S)", entry)
    if found is None or width - found.end() < 20:
        return _fold_command(entry, width)
    lines = textwrap.wrap(entry[found.end() :], width - found.end(), break_long_words=False, break_on_hyphens=False)
    return found[0] + ("\n" + " " * found.end()).join(lines)


def _fold_command(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    parts = textwrap.wrap(
        line, width - 2, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )  # fmt: skip
    return " \\\n".join(parts)


class _AsItIs(str):
    """A text of one line, as far as tyro asks: else it joins lines, which it never folds again."""

    def split(self, *_) -> list[str]:
        return [str(self)]


class FoldedHelp(argparse.RawDescriptionHelpFormatter):
    """For argparse: the description as `fold` has it."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return fold(text)


def parse_config(
    arguments: list[str] | None = None,
    *,
    recipe: str | None = None,
    prog: str = "python -m fastdeit.train",
    kind: type = Config,
    description: str | None = None,
) -> Config:
    """The command line over a recipe's defaults, checked.

    recipe: the one taken when --recipe is not given. kind: Config, with further groups of a command's own perhaps.
    description: of the command; the recipe's if None.
    """
    from fastdeit import config_check, deit_flags, recipes
    from fastdeit.checkpoint import resume
    from fastdeit.models import sources

    arguments = deit_flags.translate(sys.argv[1:] if arguments is None else arguments, kind)
    resumed = _flag(arguments, "resume")
    default = resume.defaults(_flag(arguments, "output-dir") if resumed == "auto" else resumed)
    begins = default is None
    if begins:
        chosen = _flag(arguments, "recipe") or recipe or ("deit_small" if _flag(arguments, "data-path") else "demo")
        default = recipes.load(chosen)
        default.run.recipe = chosen
    config = parse(
        kind, description=description or recipes.describe(default.run.recipe), prog=prog, args=arguments,
        default=kind(**vars(default)),
    )  # fmt: skip
    config.typed = typed_flags(arguments)
    if begins:
        sources.adopt(config, config.typed)
    config_check.check(config)
    if begins and kind is Config:
        config_check.check_start(config)
    if config.run.resume not in (None, "auto") and not config.run.eval:
        resume.saved_settings(Path(config.run.resume))  # refused now, not when the data have been read
    given = {word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")}
    for sentence in config_check.unread(config, given):
        tell(sentence)
    if begins and default.run.recipe == "demo" and "--recipe" not in given and given - {"--print-config"}:
        tell("without --data-path: the recipe demo, on scikit-learn's digits")
    return config


def _flag(arguments: list[str], name: str) -> str | None:
    """The value of --name in the raw arguments, the last if there are several: the recipe must be known before the
    parser is built."""
    found = None
    for position, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if key.replace("_", "-") == f"--{name}":
            found = value if equals else (arguments[position + 1] if position + 1 < len(arguments) else None)
    return found
