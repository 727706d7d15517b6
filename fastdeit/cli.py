"""The command line: flags from dataclasses, with recipes and resumed runs as defaults."""

import argparse
import dataclasses
import functools
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from fastdeit import config_check, deit_flags, recipes, settings_file
from fastdeit.checkpoint.settings import extended_settings, resumed_settings, saved_settings
from fastdeit.config import Config, check_bounds
from fastdeit.errors import tell
from fastdeit.models import sources

PROGRAM = "python -m fastdeit."  # what stands before a command's name in its help; fastdeit/__main__.py changes it


def program(prog: str) -> str:
    """`prog`, as python -m has it, as the user has called it."""
    return prog.replace("python -m fastdeit.", PROGRAM)


def parse(kind: type, *, description: str, prog: str = "", **options):
    """tyro.cli of a dataclass, its values within their bounds (config.setting). description: as `fold` takes it."""
    import tyro

    _put_help_on_one_line(kind)
    description = description.partition("\nMay import:")[0]  # of a package's docstring, for its readers
    parsed = tyro.cli(
        tyro.conf.OmitArgPrefixes[kind], description=_Verbatim(fold(description)), prog=program(prog) or None, **options
    )
    check_bounds(parsed)
    return parsed


@functools.cache
def _put_help_on_one_line(kind: type) -> None:
    """Put each field's docstring where tyro does not begin a paragraph with each of its lines."""
    import docstring_parser  # tyro's

    texts = {one.arg_name: one.description for one in docstring_parser.parse_from_object(kind).params}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            _put_help_on_one_line(field.type)
        elif text := texts.get(field.name):
            field.metadata = {**field.metadata, "help": " ".join(text.split())}


class _Verbatim(str):
    """tyro joins the lines of a description, and never fills them again; this is one line, as far as it asks."""

    def split(self, *_) -> list[str]:
        return [str(self)]


def fold(text: str) -> str:
    """Paragraphs filled to the terminal's width; those with an indented line (commands, tables) stay as they are."""
    width = min(shutil.get_terminal_size().columns - 1, 119)
    paragraphs = re.split(r"\n\n+", text.strip("\n"))
    return "\n\n".join(
        one if re.search("^ ", one, re.MULTILINE) else textwrap.fill(one, width, break_on_hyphens=False)
        for one in paragraphs
    )


class FoldedHelp(argparse.RawDescriptionHelpFormatter):
    """For argparse: the description as `fold` has it."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return fold(text)


def typed_flags(arguments: Sequence[str]) -> frozenset[str]:
    """The flags of a command line, in one spelling: --no-model_ema and --model-ema=True are both --model-ema. What
    was typed outranks what a checkpoint knows; what is only a default does not."""
    flags = (argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--"))
    return frozenset(re.sub(r"^--no-", "--", flag) for flag in flags)


def parse_config(
    arguments: list[str] | None = None,
    *,
    recipe: str | None = None,
    prog: str = "python -m fastdeit.train",
    kind: type = Config,
    description: str | None = None,
) -> Config:
    """The command line over the defaults of a recipe, or of the run that --resume names, checked.

    recipe: the one taken if --recipe is omitted. kind: Config, with further groups of a command's own perhaps.
    description: of the command; the recipe's if None.
    """
    arguments = _switches_with_values(sys.argv[1:] if arguments is None else arguments, kind)
    arguments = deit_flags.translate(arguments, kind)
    given = {word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")}
    if (file := _flag(arguments, "config")) is not None:
        arguments = [*settings_file.flags_of(Path(file), kind), *arguments]
    resumed = _flag(arguments, "resume")
    default = resumed_settings(_flag(arguments, "output-dir") if resumed == "auto" else resumed)
    starts = default is None
    extended = _flag(arguments, "extend")
    if starts and extended:
        default, starts = extended_settings(extended), False
    if starts:
        chosen = _flag(arguments, "recipe") or recipe or ("deit_small" if _flag(arguments, "data-path") else "demo")
        default = recipes.load(chosen)
        default.run.recipe = chosen
    config = parse(
        kind, description=description or recipes.describe(default.run.recipe), prog=prog, args=arguments,
        default=kind(**vars(default)),
    )  # fmt: skip
    config.typed = typed_flags(arguments)
    smaller = None
    if starts:
        smaller = _smaller_on_a_cpu(config)
        keep_size = recipes.changes_size(chosen) and not config.run.eval
        sources.adopt(config, config.typed, keep_size=keep_size)
    config_check.check(config)
    if starts and kind is Config:
        config_check.check_start(config)
    if config.run.resume not in (None, "auto") and not config.run.eval:
        saved_settings(Path(config.run.resume))  # refused before the data are read
    for sentence in config_check.unread(config, given):
        tell(sentence)
    if starts and smaller:
        tell(smaller)
    if starts and default.run.recipe == "demo" and "--recipe" not in config.typed and given - {"--print-config"}:
        tell("without --data-path: the recipe demo, on scikit-learn's digits")
    return config


def _smaller_on_a_cpu(config: Config) -> str | None:
    """Without a GPU, DeiT-Ti in place of a DeiT-S that nobody asked for by name, and a sentence about it."""
    run, model, typed = config.run, config.model, config.typed
    asked_for = "--model" in typed or model.finetune or ("--recipe" in typed and run.recipe != "finetune")
    if asked_for or model.model != "deit_small_patch16_224" or _has_gpu(run.device):
        return None
    model.model = "deit_tiny_patch16_224"
    if run.recipe == "deit_small":
        run.recipe = "deit_tiny"  # which differs in the model alone
    return (
        "no GPU: the model is deit_tiny_patch16_224, with a quarter of the parameters of deit_small_patch16_224; "
        "--model chooses"
    )


def _has_gpu(device: str | None) -> bool:
    """device: of --device."""
    if device is not None:
        return device != "cpu"
    import torch

    return torch.cuda.is_available()


def _switches_with_values(arguments: Sequence[str], kind: type) -> list[str]:
    """--compile as --compile True, --no-compile as --compile False, as tyro takes a setting that may also be None."""
    fields = [field for group in dataclasses.fields(kind) for field in dataclasses.fields(group.type)]
    switches = {f"--{field.name.replace('_', '-')}" for field in fields if field.type == bool | None}
    words: list[str] = []
    for word, following in zip(arguments, [*arguments[1:], ""]):
        flag = word.replace("_", "-")
        words.append(word)
        if flag in switches and following not in ("True", "False", "None"):
            words.append("True")
        elif flag.startswith("--no-") and f"--{flag[5:]}" in switches:
            words[-1:] = [f"--{flag[5:]}", "False"]
    return words


def _flag(arguments: list[str], name: str) -> str | None:
    """The value of --name in the raw arguments, the last if there are several: the recipe must be known before the
    parser is built."""
    found = None
    for position, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if key.replace("_", "-") == f"--{name}":
            found = value if equals else (arguments[position + 1] if position + 1 < len(arguments) else None)
    return found
