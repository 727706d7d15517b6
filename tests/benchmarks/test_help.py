import pytest

from benchmarks import __main__ as benchmarks


def test_the_help_of_all_fits_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["benchmarks", "--help"])
    with pytest.raises(SystemExit):
        benchmarks.main()
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "python -m benchmarks attention loss" in out
