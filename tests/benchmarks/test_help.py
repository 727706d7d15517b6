import ast
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from fastdeit.cli import fold

FILES = [
    file for file in sorted(Path(benchmarks.__file__).parent.glob("*.py")) if "FoldedHelp" in file.read_text()
    or "parser(__doc__)" in file.read_text()
]  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_line_is_left_to_the_terminal_to_break(file, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = fold(ast.get_docstring(ast.parse(file.read_text()), clean=False))
    assert max(map(len, text.splitlines())) <= 79
    for paragraph in text.split("\n\n"):  # a command goes on behind a backslash; a table would not
        assert "\\" not in paragraph or paragraph.strip().startswith(("python ", "torchrun ")), paragraph


def test_the_help_of_all_fits_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["benchmarks", "--help"])
    with pytest.raises(SystemExit):
        benchmarks.main()
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "python -m benchmarks attention loss" in out
