"""What a terminal shows of a run."""

import io

import pytest
from rich.console import Console

from fastdeit.training.log import Log, bar_text

FIGURES = {
    "loss": 0.146, "class_loss": 0.291, "teacher_loss": 0.001, "attention_loss": 0.001, "lr": 1.5e-3,
    "images_per_s": 164.0, "data_share": 0.25,
}  # fmt: skip


@pytest.fixture
def terminal(monkeypatch):
    """Log on a terminal of so many columns: terminal(columns) -> (log, what was written)."""

    def made(columns):
        written = io.StringIO()
        monkeypatch.setattr(
            "fastdeit.training.log.Console",
            lambda **options: Console(
                **options, file=written, force_terminal=True, width=columns, legacy_windows=False
            ),
        )
        return Log(None, total_steps=1200, title="student"), written

    return made


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_the_bar_and_the_time_left_have_room(terminal, columns):
    log, written = terminal(columns)
    log.begin()
    log.train(step=369, epoch=122, **FIGURES)
    log.bar.refresh()
    log.close()
    last = written.getvalue().split("student")[-1]
    for words in ("epoch 123", "loss 0.146", "━━━━", "369/1200", "left"):
        assert words in last, (words, last)
    assert ("lr 1.5e-03" in last) == (columns > 100)


def test_the_bars_text_takes_what_fits():
    assert bar_text("student", 0, FIGURES, 10) == "student  epoch 1"
    assert bar_text("student", 0, FIGURES, 30) == "student  epoch 1  loss 0.146"
    assert bar_text("student", 0, FIGURES, 99).endswith("data 25 %  lr 1.5e-03")


ACCURACY = {source: {"cls": 0.2333, "dist": 0.2528, "both": 0.2444} for source in ("model", "ema")}
EVALUATED = {
    "step": 66, "epoch": 2, "epochs": 30, "figures": FIGURES | {"class_loss": 0.2}, "seconds": 1.0,
    "accuracy": ACCURACY,
}  # fmt: skip


@pytest.mark.parametrize("columns", [80, 100])
def test_an_epochs_figures_are_not_torn_apart(terminal, columns):
    log, written = terminal(columns)
    log.evaluated(**EVALUATED)
    lines = written.getvalue().splitlines()
    assert lines[0].startswith("epoch  3/30  loss 0.146 (class 0.200, teacher 0.001, attention 0.001)")
    assert len(lines) > 1 and max(map(len, lines)) <= columns
    assert all(line.startswith(" " * len("epoch  3/30  ")) for line in lines[1:])
    for part in ("164 images/s", "data 25 %", "left -:--:--", "top-1 % cls 23.33", "ema cls 23.33", "ema both 24.44"):
        assert sum(part in line for line in lines) == 1, part


def test_without_a_terminal_an_epoch_is_one_line(capsys):
    Log(None, total_steps=1200, title="student").evaluated(**EVALUATED)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("epoch  3/30  loss 0.146") and line.endswith("ema dist 25.28  ema both 24.44")


def test_of_quick_epochs_without_an_evaluation_not_every_one_has_a_line(monkeypatch, capsys):
    clock = iter([0.0, 0.5, 1.5, 2.5, 2.5, 3.0, 4.6, 4.6, 4.7])  # begins; each epoch, and again where it is said
    monkeypatch.setattr("fastdeit.training.log.time.monotonic", lambda: next(clock))
    log = Log(None, total_steps=1200, title="student")
    for epoch in range(5):
        log.epoch(step=2, epoch=epoch, epochs=99, figures=FIGURES)
    assert [line[:8] for line in capsys.readouterr().out.splitlines()] == ["epoch  3", "epoch  5"]
    log.epoch(step=2, epoch=5, epochs=99, figures=FIGURES, results=["top-1 % cls 23.33"])
    assert "cls 23.33" in capsys.readouterr().out


def test_the_cursor_is_hidden_only_while_steps_are_made(terminal):
    log, written = terminal(80)
    log.say("teacher: refused")
    assert "\x1b[?25l" not in written.getvalue()
    log.begin()
    assert "\x1b[?25l" in written.getvalue()
    log.close()
    assert written.getvalue().rindex("\x1b[?25h") > written.getvalue().rindex("\x1b[?25l")
