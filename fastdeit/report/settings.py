"""The settings of a run beside its recipe's: which differ, and the command that gives them again."""

import shlex

from fastdeit import recipes
from fastdeit.errors import UserError

NOT_ASKED = {"recipe", "resume", "eval", "dry_run", "print_config"}  # how the command was used, not what was trained
WIDTH = 118  # of the command's lines
_MISSING = object()


def recipe_settings(settings: dict) -> dict | None:
    """The recipe's settings in groups, as `settings` are; None if the run had no recipe, or one unknown here."""
    try:
        return recipes.load(settings["run"]["recipe"]).to_dict()
    except (KeyError, UserError):
        return None


def differences(settings: dict, recipe: dict | None) -> dict[tuple[str, str], object]:
    """The recipe's value for each (group, name) where the run has another one."""
    if recipe is None:
        return {}
    found = {}
    for group, values in settings.items():
        for name, value in values.items():
            own = recipe.get(group, {}).get(name, _MISSING)
            if name not in NOT_ASKED and own is not _MISSING and own != value:
                found[group, name] = own
    return found


def command(settings: dict, changed: dict, processes: int | None) -> str:
    """A command line that trains with these settings, broken between flags."""
    start = "python -m" if processes in (None, 1) else f"torchrun --nproc-per-node {processes} -m"
    lines = [f"{start} fastdeit.train {shlex.join(['--recipe', settings['run']['recipe']])}"]
    for flag in (shlex.join(_flag(name, settings[group][name])) for group, name in changed):
        if len(lines[-1]) + len(flag) < WIDTH:
            lines[-1] += f" {flag}"
        else:
            lines.append(f"    {flag}")
    return " \\\n".join(lines)


def _flag(name: str, value) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{flag}", *map(written, values)]


def written(value) -> str:
    """A setting's value as the command line has it."""
    if isinstance(value, list):
        return " ".join(map(written, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
