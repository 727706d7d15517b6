"""What every command shares: a mistake of the user's ends in one sentence and exit code 2, never in a traceback; and
help that reads well on any terminal."""

import argparse
import ast
import dataclasses
import errno
import functools
import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Annotated

# What `pip install fastdeit` leaves out. Commands import these inside `main`, so that a missing one is named here.
EXTRA = {
    "matplotlib", "nvidia", "PIL", "pyarrow", "rich", "safetensors", "scipy", "sklearn", "timm", "torchvision", "tyro",
}  # fmt: skip


class UserError(Exception):
    """Something the user can put right. The message names the thing and the remedy."""


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with its code.

    An exception type of this package (`UserError`, `TooManyBadFiles`, ...) and a `ValueError` raised by a line of it
    end in one sentence and exit code 2. Everything else is a defect and keeps its traceback; FASTDEIT_TRACEBACK=1 shows
    it always.
    """
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at the end
        code = 0
    except Exception as error:
        message = in_words(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        code = 2
    sys.exit(code)


def tell(sentence: str) -> None:
    """Say what is to be known beside the command's output; of several processes the first does."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(sentence, file=sys.stderr, flush=True)


def in_words(error: Exception) -> str | None:
    """What to tell the user, or None for a defect."""
    if os.environ.get("FASTDEIT_TRACEBACK") == "1":
        return None
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in EXTRA:
        return f"{error.name} is not installed: pip install 'fastdeit[train]' brings it"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}: make room, and go on with a run by --resume"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        return f"{error.filename}: {error.strerror}; choose another place, or see to the permissions of this one"
    if isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError)) and error.filename:
        return f"{error.filename}: {error.strerror}; choose another place"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by name: not every command has imported torch
        wanted = ". ".join(str(error).split(". ")[:2]).rstrip(".")
        return (
            f"the GPU's memory does not suffice ({wanted}): lower --batch-size; in training --accumulate makes up for "
            "it, and --grad-checkpointing takes less memory too"
        )
    if _is_ours(type(error).__module__) or (isinstance(error, ValueError) and _is_ours(_raising_module(error))):
        return " ".join(str(error).split())
    return None


def _is_ours(module: str) -> bool:
    return module == "__main__" or module.split(".")[0] == "fastdeit"


def _raising_module(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""


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
