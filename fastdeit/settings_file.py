"""Settings from a file, as the flags that would say the same: --config FILE.

    data:                      lr: 1e-3                   [data]                   {"data": {"batch_size": 256}}
      batch_size: 256          batch-size: 256            batch_size = 256

YAML, TOML or JSON, by the file's name. Settings stand in the groups of --print-config or at the top level; those that
are missing keep their defaults. A run's settings.json is such a file, and starts another run with its settings.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterator
from pathlib import Path

from fastdeit.errors import UserError

# What was of a run alone, and is not taken from its settings.json.
OF_ITS_RUN = ("config", "dry_run", "eval", "extend", "output_dir", "print_config", "resume")


def flags_of(file: Path, kind: type) -> list[str]:
    """The command line of a file's settings. kind: the dataclass of groups that they belong to.

    Raises UserError for a file that cannot be read, and for a setting that does not exist.
    """
    fields = {
        field.name: (group.name, field)
        for group in dataclasses.fields(kind)
        for field in dataclasses.fields(group.type)
    }
    words = []
    for name, value in _settings(file, {group.name for group in dataclasses.fields(kind)}):
        group, _, own = name.rpartition(".")
        own = own.replace("-", "_")
        if own not in fields or group not in ("", fields[own][0]):
            near = difflib.get_close_matches(own, fields, n=1)
            meant = (
                f"; did you mean {fields[near[0]][0]}.{near[0]}?" if near else "; --print-config shows what there is"
            )
            raise UserError(f"--config {file}: there is no setting {name}{meant}")
        of_its_run = file.name == "settings.json" and own in OF_ITS_RUN
        not_chosen = value is None and own in ("recipe", "data_path", "resume", "extend", "output_dir")
        if not (of_its_run or not_chosen or own == "config"):
            words += _words(own, value, fields[own][1], file)
    return words


def _settings(file: Path, groups: set[str]) -> Iterator[tuple[str, object]]:
    """(name, value), the name with its group before it where it stands in one."""
    content = _read(file)
    if not isinstance(content, dict):
        raise UserError(f"--config {file}: expected names with values, found a {type(content).__name__}")
    for name, value in content.items():
        if name in groups and isinstance(value, dict):
            yield from ((f"{name}.{own}", one) for own, one in value.items())
        else:
            yield str(name), value


def _read(file: Path) -> object:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file}: {getattr(error, 'strerror', None) or error}") from error
    try:
        if file.suffix == ".json":
            return json.loads(text)
        if file.suffix == ".toml":
            return _toml(text)
        if file.suffix in (".yaml", ".yml"):
            return _yaml(text)
    except ValueError as error:
        raise UserError(f"--config {file}: {error}") from error
    raise UserError(f"--config {file}: give a file that ends in .yaml, .yml, .toml or .json")


def _toml(text: str) -> object:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        try:
            import tomli as tomllib
        except ModuleNotFoundError:
            raise UserError("--config: TOML needs Python 3.11 or newer, or: pip install tomli") from None
    return tomllib.loads(text)


def _yaml(text: str) -> object:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def _words(name: str, value: object, field: dataclasses.Field, file: Path) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, dict):
        raise UserError(f"--config {file}: {name} takes a value, not names with values")
    if field.type is bool:
        if not isinstance(value, bool):
            raise UserError(f"--config {file}: {name} is true or false, not {value!r}")
        return [flag if value else f"--no-{flag[2:]}"]
    values = value if isinstance(value, list) else [value]
    # A word that begins with a dash would be read as a flag.
    return [flag, *map(str, values)] if len(values) != 1 else [f"{flag}={values[0]}"]
