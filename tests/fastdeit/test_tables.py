"""The tables on terminals of several widths."""

import pytest

from fastdeit.evaluation.tables import accuracy_table, summary_table

VALUES = {"top1": 0.9944, "top5": 1.0, "loss": 0.6482, "ece": 0.1215}
FIGURES = ["99.44", "100.00", "0.6482", "12.15"]
ACCURACY = {source: dict.fromkeys(("cls", "dist", "both"), VALUES) for source in ("model", "ema")}
SUMMARY = {"teacher": 0.9889, "cls": 0.9944, "undistilled": 0.9722}


@pytest.mark.parametrize("columns", [60, 79, 80, 200])
def test_accuracies_are_whole_at_any_width(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    table = accuracy_table(ACCURACY)
    assert max(map(len, table.splitlines())) <= columns and "…" not in table
    assert ("━" in table) == (columns >= 79)
    rows = [line for line in table.splitlines() if "0.6482" in line]
    assert len(rows) == 6
    for row in rows:
        assert row.replace("│", " ").split()[-4:] == FIGURES
    words = table.replace("│", " ").split()
    for word, count in {"trained": 3, "moving": 3, "class": 2, "distillation": 2, "averaged": 2}.items():
        assert words.count(word) == count, word


@pytest.mark.parametrize("columns", [40, 80])
def test_the_closing_table(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    table = summary_table(SUMMARY)
    assert max(map(len, table.splitlines())) <= columns and ("━" in table) == (columns == 80)
    assert [line.split()[-1] for line in table.replace("│", " ").splitlines() if "9" in line] == [
        "98.89", "99.44", "97.22",
    ]  # fmt: skip


def test_without_a_terminal_nothing_is_folded(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert all("━" in table for table in (accuracy_table(ACCURACY), summary_table(SUMMARY)))
