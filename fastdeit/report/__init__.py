"""One HTML page about a training run, in one file that needs nothing else.

    python -m fastdeit.report RUN [--output FILE]

The page shows what RUN's folder holds: accuracies, curves, where the time went, the first batch, all settings. While
the checkpoint and the validation images are still there, also what the class and distillation token look at. A run that
is not finished, or was stopped, gets a page too, which says how far it is. Nothing else in RUN is changed.

May import: checkpoint, cli, curriculum, data, errors, evaluation, models, pipelines, recipes, training, tuning.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastdeit.cli import parse
from fastdeit.errors import UserError


def main() -> None:
    import tyro

    @dataclass(kw_only=True)
    class Report:
        run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
        """A run's folder."""
        output: Path | None = None
        """The file to write. None: RUN/report.html."""

    arguments = parse(Report, prog="python -m fastdeit.report", description=__doc__)
    file = write(arguments.run, arguments.output)
    print(f"{file}: {file.stat().st_size / 1000:,.0f} kB")


def write(folder: Path, file: Path | None = None) -> Path:
    """Write the page about the run in `folder`; returns its file. Raises UserError."""
    from fastdeit.checkpoint import atomic

    from .page import page
    from .record import Record

    file = file or folder / "report.html"
    if file.is_dir():
        raise UserError(f"--output {file} is a folder: give the name of a file")
    content = page(Record.read(folder)).encode("utf-8", "replace")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.replace(file, content)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"{file} cannot be written ({error.strerror}): give another file by --output") from error
    return file
