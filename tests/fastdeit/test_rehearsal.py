"""What a run compiles before it trains: the step at every size of images, and number of patches, that is to come."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from fastdeit.distributed import parallel
from fastdeit.distributed.world import World
from fastdeit.training.trainer import Trainer

from .runs import RANDOM, assert_same, run
from .test_step_graph import CASES, settings, stream
from .test_training_arithmetic import SIZE


class Pooled(nn.Sequential):
    """A network for images of any size, with running statistics."""

    def __init__(self):
        torch.manual_seed(0)
        pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *pool)


def trainer_of(case, *, curriculum="4,8", patch_drop=0.0):
    """Two epochs of work, four steps each: of 4 pixels four epochs, then of 8 one."""
    make, teacher, *_ = CASES[case]
    config = settings(case)
    config.data.input_size, config.optimization.epochs, config.optimization.curriculum = SIZE, 2, curriculum
    config.model.patch_drop = patch_drop
    model = Pooled() if case == "running statistics" else make()
    trainer = Trainer(config, World(torch.device("cpu")), model, teacher and teacher(), steps_per_epoch=4)
    trainer.model.train()
    trainer.begin_epoch(0)
    return trainer


@pytest.mark.parametrize(
    "curriculum, patch_drop, step, turns",
    [
        ("4,8", 0.0, 0, [0, 16]),
        ("4,8", 0.5, 0, [0, 16, 19]),  # the last tenth of the work is one step
        ("4,8", 0.5, 17, [17, 19]),
        ("4,8", 0.5, 19, [19]),
        ("8,4,8", 0.0, 0, [0, 4]),  # 8 pixels again at step 12 are nothing new
        ("8,4,8", 0.0, 5, [5, 12]),  # unless the process begins after the first
        ("none", 0.5, 0, [0, 7]),
        ("none", 0.0, 3, [3]),
    ],
)
def test_where_steps_become_others(curriculum, patch_drop, step, turns):
    trainer = trainer_of("adamw, hard, accumulated, clipped", curriculum=curriculum, patch_drop=patch_drop)
    trainer.state.step = step
    assert trainer.turns() == turns


@pytest.mark.parametrize(
    "case, patch_drop",
    [
        ("adamw, hard, accumulated, clipped", 0.5),
        ("cached, soft", 0.0),
        ("features, muon", 0.0),
        ("fp16", 0.5),
        ("running statistics", 0.0),
    ],
)
def test_it_changes_nothing(case, patch_drop):
    plain, rehearsed = (trainer_of(case, patch_drop=patch_drop) for _ in range(2))
    for step, batch in enumerate(stream(case)[:3]):
        if step != 1:  # before there are moments, and after
            rehearsed.rehearse(batch)
        assert (rehearsed.state.step, rehearsed.size) == (step, 4)
        assert torch.equal(plain.step(batch), rehearsed.step(batch))
    for kind, tensors in plain.changed().items():
        assert all(map(torch.equal, tensors, rehearsed.changed()[kind])), kind
    assert rehearsed.news == plain.news == []


def test_nothing_is_compiled_after_it():
    """Neither where the size changes, nor where all patches are seen."""
    counter = CompileCounter()
    trainer = trainer_of("sgd, labels", patch_drop=0.5)
    torch._dynamo.reset()
    trainer.model.compile(backend=counter, dynamic=False)
    seen = stream("sgd, labels") * 4
    trainer.rehearse(seen[0])
    trainer.step(seen[0])
    compiled = counter.frame_count
    shapes = set()
    for step in range(1, 20):
        trainer.begin_epoch(step // 4)
        trainer.step(seen[step])
        shapes.add((trainer.size, trainer.patch_drop))
    assert shapes == {(4, 0.5), (8, 0.5), (8, 0.0)}
    assert counter.frame_count == compiled == 3


STAGED = [*RANDOM, "--epochs", 2, "--curriculum", "8:0,12:5,16:9"]  # of three steps an epoch, 5 epochs in all


def test_a_run_says_it_once_and_is_the_same(colors, tmp_path, monkeypatch, capsys):
    """Compiled by a backend that changes no number."""
    run(*STAGED, "--data-path", colors, "--output-dir", tmp_path / "plain")
    counter, compiled, step = CompileCounter(), [], Trainer.step
    monkeypatch.setattr(
        parallel, "compile_model", lambda model, *_, **__: model.compile(backend=counter, dynamic=False)
    )
    monkeypatch.setattr("fastdeit.training.evaluation.compiles", lambda *_: False)

    def counted(trainer, *arguments):
        losses = step(trainer, *arguments)
        compiled.append(counter.frame_count)
        return losses

    monkeypatch.setattr(Trainer, "step", counted)
    capsys.readouterr()
    torch._dynamo.reset()
    run(*STAGED, "--data-path", colors, "--output-dir", tmp_path / "compiled", "--compile")
    said = capsys.readouterr().out
    assert said.count("compiling the training step") == 1
    assert "compiling the training step for each of the 3 sizes of its input: the first takes longer" in said
    assert compiled == [3] * 15  # all before the first step
    assert_same(tmp_path / "plain", tmp_path / "compiled")
