"""SIGTERM, SIGINT and SIGUSR1 in every phase of a run: what was trained is saved, the exit code tells the signal."""

import json
import signal
import time

import pytest

from fastdeit.checkpoint import files
from fastdeit.distributed.signals import Stop

from .processes import At, Child, Within, interrupt, terminate, terminate_and_hang, user_signal
from .runs import RANDOM, assert_same, run, step_of


@pytest.fixture(scope="module")
def straight(colors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(*RANDOM, "--data-path", colors, "--output-dir", folder)
    return folder


@pytest.fixture
def start(colors, tmp_path):
    def call(*arguments, **hooks):
        command = [*RANDOM, "--data-path", colors, "--output-dir", tmp_path / "run", "--resume", "auto", *arguments]
        return Child(*command, log=tmp_path / "log.txt", **hooks)

    return call


@pytest.mark.parametrize("action, number", [(terminate, 15), (interrupt, 2), (user_signal, 10)])
def test_in_a_step(start, straight, tmp_path, action, number):
    """The step is finished and saved."""
    child = start(on_micro_batch=At(4, action))
    assert child.wait() == 128 + number
    assert step_of(tmp_path / "run") == 5
    assert f"{signal.Signals(number).name}: finishing this step" in child.text and "saved at step 5" in child.text
    if number == signal.SIGTERM:
        run("--resume", tmp_path / "run")
        assert_same(straight, tmp_path / "run")


@pytest.mark.parametrize(
    "hooks, step, told",
    [
        ({"first": Within("fastdeit.data", "open_index", terminate_and_hang)}, None, None),
        ({"on_micro_batch": At(0, terminate_and_hang)}, None, "nothing is trained yet"),  # the first step: compilation
        (
            {"first": Within("fastdeit.training.loop:Loop", "evaluate", terminate_and_hang)},
            3,
            "saved at step 3 of 9",
        ),
        (
            {"first": Within("fastdeit.checkpoint.files", "save", terminate)},
            3,
            "saved at step 3 of 9",
        ),  # as it is written
    ],
)
def test_where_nothing_would_be_lost(start, straight, tmp_path, hooks, step, told):
    """The process ends at once, however long the phase would go on; what is being written is written."""
    child = start(**hooks)
    assert child.wait() == 128 + signal.SIGTERM
    assert "SIGTERM" in child.text
    run_folder = tmp_path / "run"
    command = f"{told}; resume by: python -m fastdeit.train --resume {run_folder}\n"
    assert command in child.text if told else "resume by" not in child.text
    assert not (run_folder / "last").exists() if step is None else step_of(run_folder) == step
    if step is not None:
        run("--resume", run_folder)
        assert_same(straight, run_folder)


def test_while_the_state_is_copied(start, tmp_path):
    child = start(first=Within("fastdeit.checkpoint.async_writer:Snapshot", "take", terminate))
    assert child.wait() == 128 + signal.SIGTERM
    assert step_of(tmp_path / "run") == 3


def test_a_second_signal_ends_at_once(start, tmp_path):
    child = start(on_micro_batch=At(4, terminate_and_hang))
    while "finishing this step" not in (child.text if child.log.exists() else ""):
        assert child.process.is_alive()
        time.sleep(0.05)
    child.kill(signal.SIGTERM)  # within a second: counts as the same
    time.sleep(1.2)
    assert child.process.is_alive()
    since = time.monotonic()
    child.kill(signal.SIGINT)
    assert child.wait() == 128 + signal.SIGINT
    assert time.monotonic() - since < 5
    assert step_of(tmp_path / "run") == 3  # the step was not finished


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with Stop():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_checkpoints_between_epochs(colors, tmp_path):
    """After every step when the time is up at once: last moves, metrics stay whole."""
    folder = tmp_path / "run"
    steps = []
    saved = files.save

    def save(*args, **kwargs):
        steps.append(kwargs["step"])
        return saved(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "save", save)
        run(*RANDOM, "--data-path", colors, "--output-dir", folder, "--epochs", 2, "--checkpoint-minutes", 0)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [record["kind"] for record in map(json.loads, (folder / "metrics.jsonl").open())] == ["train", "eval"] * 2
