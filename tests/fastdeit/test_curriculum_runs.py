"""Runs with a curriculum: what the student and its teacher see, resuming at any step, several processes, graphs."""

from unittest import mock

import pytest
import torch

from fastdeit.curriculum import Curriculum
from fastdeit.distributed.world import World
from fastdeit.models.deit import DeiT
from fastdeit.training.loop import Loop
from fastdeit.training.step_graph import WARM_UP
from fastdeit.training.trainer import Trainer

from .conftest import refused
from .processes import start_ranks
from .recorded import DeviceOnly, Recorded
from .runs import RANDOM, assert_same, lines, run, run_until, step_of
from .test_distributed import finish
from .test_step_graph import compare, settings, stream
from .test_training_arithmetic import SIZE, Teacher, batches, deit

# Three steps an epoch on the colours.
STAGED = [*RANDOM, "--epochs", 2, "--curriculum", "8:0,12:5,16:9"]
EPOCHS = [(8, 0)] * 3 + [(12, 5)] + [(16, 9)]  # 2.67, 3.85, 4.52 rounded


@pytest.fixture(scope="module")
def straight(colors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    seen, embed = [], DeiT.embed

    def look(model, images, patches=None):
        seen.append((model.training, images.shape[-1]))
        return embed(model, images, patches)

    with mock.patch.object(DeiT, "embed", look):
        run(*STAGED, "--data-path", colors, "--output-dir", folder)
    return folder, seen


def test_the_student_sees_each_size_in_its_epochs(straight):
    folder, seen = straight
    trained, evaluated = ([size for training, size in seen if training == which] for which in (True, False))
    assert trained == [size for size, _ in EPOCHS for _ in range(3)] and step_of(folder) == 15
    assert set(evaluated) == {16} and len(evaluated) >= 2 * 5  # of the weights and of their average, always whole
    assert [line["epoch"] for line in lines(folder) if line["kind"] == "eval"] == list(range(5))


@pytest.mark.parametrize("step", [1, 8, 13])  # in the first part, at its end, in the last
def test_resume_is_exact(straight, colors, tmp_path, monkeypatch, step):
    folder = tmp_path / "run"
    run_until(monkeypatch, step, *STAGED, "--data-path", colors, "--output-dir", folder)
    run("--resume", folder, "--num-workers", 3)
    assert_same(straight[0], folder)


def test_a_resumed_run_keeps_its_curriculum(straight, cli):
    from fastdeit import train

    refused(cli, train.main, "--resume", straight[0], "--curriculum", "16:9", words=["--curriculum", "started with"])


def test_the_log_says_where_a_part_begins(colors, tmp_path, capsys):
    run(*STAGED, "--data-path", colors, "--output-dir", tmp_path / "run", "--curriculum", "8:0,8:4,16:9")
    said = [line for line in capsys.readouterr().out.splitlines() if "pixels" in line]
    assert said[0] == (
        "--curriculum 8:0,8:4,16:9: 6 epochs, the work of 2 at 16 pixels: 8 pixels until epoch 5, 16 until 6"
    )
    assert said[1:] == [
        "epochs 1 to 3 of 6: images of 8 pixels, RandAugment of magnitude 0",
        "epochs 4 to 5 of 6: images of 8 pixels, RandAugment of magnitude 4",
        "epoch 6 of 6: images of 16 pixels, RandAugment of magnitude 9",
    ]


@pytest.mark.parametrize("options", [["--batch-size", 6], ["--batch-size", 2, "--accumulate", 3, "--sharding", "fsdp"]])
def test_the_numbers_of_one_process_on_two(colors, tmp_path, options):
    command = [*STAGED, "--opt", "sgd", "--lr", "0.1", "--curriculum", "12:0,16:9", "--data-path", colors]
    run(*command, "--output-dir", tmp_path / "alone")
    finish(start_ranks(2, *command, "--output-dir", tmp_path / "run", *options, logs=tmp_path))
    assert_same(tmp_path / "alone", tmp_path / "run", exact=False)


# ---------------------------------------------------------------------------------------------------------------------
# The step


class Looks(Teacher):
    """A teacher that remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __call__(self, images, batch=None):
        self.seen.append(images.clone())
        return super().__call__(images, batch)


def trainer_of(teacher=None, model=deit):
    """At 4 pixels for four epochs, then at 8 for one."""
    case = "adamw, hard, accumulated, clipped"
    config = settings(case)
    config.data.input_size, config.optimization.epochs, config.optimization.curriculum = SIZE, 2, "4,8"
    trainer = Trainer(config, World(torch.device("cpu")), model(), teacher or Teacher(), steps_per_epoch=4)
    trainer.model.train()
    return trainer, stream(case)


def test_the_teacher_sees_the_whole_view():
    shown = []
    for small in (False, True):
        trainer, seen = trainer_of(Looks())
        if small:
            trainer.begin_epoch(0)
            assert trainer.size == 4
        trainer.step(seen[0])
        shown.append(trainer.teacher.seen)
    assert all(map(torch.equal, *shown)) and shown[1][0].shape[-1] == SIZE


def test_the_graph_is_captured_anew_at_another_size():
    """Replays at both sizes are the steps as they are, to the bit; nothing is asked of the host at either."""
    (plain, seen), (graphed, _) = trainer_of(), trainer_of()
    capture = Recorded()
    graphed.capture_steps(capture)
    steps = iter(seen * 2)
    for epoch in (0, 4):
        before = graphed.graph
        plain.begin_epoch(epoch)
        graphed.begin_epoch(epoch)
        assert graphed.graph is not before
        for _ in range(WARM_UP + 3):
            batch = next(steps)
            assert torch.equal(plain.step(batch), graphed.step(batch))
            compare(plain, graphed, epoch)
    assert capture.replays == 2 * (3 + 1)  # the proofs too
    assert len(graphed.news) == 2 and all("agreed" in sentence for sentence in graphed.news)
    graph = graphed.graph
    graphed.begin_epoch(4)
    assert graphed.graph is graph


def test_a_small_step_asks_nothing_of_the_host():
    trainer, seen = trainer_of()
    trainer.begin_epoch(0)
    for batch in seen[:2]:
        trainer.step(batch)
    inputs = trainer.inputs(seen[2])
    with DeviceOnly() as mode:
        losses = trainer.compute(inputs, trainer.world.mean)
    assert mode.outlive() == 1 and losses.shape == (5,)


def test_the_report_says_the_curriculum(straight):
    from fastdeit.report.page import page
    from fastdeit.report.record import Record

    record = Record.read(straight[0])
    assert record.total_steps == 15
    assert "5 epochs, the work of 2 at 16 pixels: 8 pixels until epoch 3, 12 until 4, 16 until 5" in page(record)


def test_the_learning_rate_follows_the_work():
    """Four epochs of four small steps are the work of four steps at the full size; the rest cost what they are."""
    staged, plain = trainer_of()[0], trainer_of()[0]
    plain.curriculum = Curriculum.read("none", 2, SIZE)
    assert (staged.total_steps, staged.total_work) == (20, 8)
    assert [staged.lr(step) for step in (0, 4, 8, 16, 17, 18, 20)] == [plain.lr(step) for step in (0, 1, 2, 4, 5, 6, 8)]


@pytest.mark.parametrize("live", [True, False])
def test_the_time_left_is_of_what_costs_most(live):
    """The student's pixels; with a live teacher the teacher, whose work is the same in all steps."""
    trainer = trainer_of()[0]
    trainer.config.distillation.teacher_store = None if live else "cache"
    seen = batches()
    remaining = Loop(trainer, (seen, seen), list("abcde"), None).log.remaining
    assert [remaining.work(step) for step in (4, 16, 20)] == ([4, 16, 20] if live else [1, 4, 8])
