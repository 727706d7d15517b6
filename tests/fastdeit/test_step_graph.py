"""The step as a CUDA graph, proved without a GPU: what it does on the device is recorded and repeated on new batches,
to the very bits of the steps as they are; and it asks nothing of the host."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from fastdeit.distill.cached_teacher import BatchWithTargets
from fastdeit.distributed.world import World
from fastdeit.errors import UserError
from fastdeit.training import run
from fastdeit.training.step_graph import WARM_UP
from fastdeit.training.trainer import Trainer

from .recorded import DeviceOnly, Forbidden, Recorded
from .reference_loop import Recipe
from .test_training_arithmetic import BATCH, CLASSES, Convolutional, Teacher, batches, deit, settings_of

STEPS = 9
NAN = float("nan")


def student(**options):
    model = deit(**options)
    model.drop_path = 0.3
    return model


class Attentive:
    """A teacher whose attention is compared."""

    fingerprint = name = "attentive"

    def __init__(self):
        self.model = deit().eval().requires_grad_(False)

    def __call__(self, images, batch=None):
        with torch.no_grad():
            return self.model(images)

    def hookable(self):
        return self.model


class Masked(Attentive):
    """One that sees some patches."""

    def __call__(self, images, batch=None, patches=None):
        with torch.no_grad():
            return self.model(images, patches=patches)


class Cached:
    fingerprint = "cached"

    def __call__(self, images, batch):
        return batch.targets


def dropping():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.2), nn.Flatten(), nn.Linear(288, CLASSES))


# name: the model, the teacher, the recipe, other settings.
CASES = {
    "adamw, hard, accumulated, clipped": (student, Teacher, {"kind": "hard", "clip": 0.5}, {"accumulate": 2}),
    "lamb, soft": (student, Teacher, {"opt": "lamb", "kind": "soft", "tau": 2.0}, {}),
    "sgd, labels": (student, None, {"opt": "sgd", "smoothing": 0.1}, {}),
    "lamb, binary, layer scale": (
        lambda: student(distilled=False, deit3=True),
        None,
        {"opt": "lamb", "binary": True},
        {},
    ),
    "cached, soft": (student, Cached, {"kind": "soft"}, {"cached": True}),
    "dkd, standardised": (student, Teacher, {"kind": "dkd", "tau": 2.0}, {"standardized": True}),
    "cached, dist": (student, Cached, {"kind": "dist"}, {"cached": True}),
    "cached, nkd, accumulated": (student, Cached, {"kind": "nkd"}, {"cached": True, "accumulate": 2}),
    "attention": (student, Attentive, {"kind": "hard"}, {"attention": 0.5}),
    "teacher's patches": (student, Masked, {"kind": "soft"}, {"patches": 0.5}),
    "features, accumulated": (student, Attentive, {"kind": "soft", "clip": 0.5}, {"features": 0.5, "accumulate": 2}),
    "features, muon": (student, Attentive, {"kind": "soft", "opt": "muon"}, {"features": 0.5}),
    "lower blocks more slowly": (student, None, {"opt": "lamb"}, {"layer_decay": 0.5}),
    "muon": (student, None, {"opt": "muon"}, {"layer_decay": 0.5}),
    "fp16": (student, Teacher, {"kind": "soft"}, {"precision": "fp16"}),
    "running statistics": (Convolutional, None, {"opt": "sgd"}, {}),
    "a model that draws for itself": (dropping, None, {}, {}),
}


def settings(case):
    *_, changes, how = CASES[case]
    recipe = Recipe(**{"total_steps": STEPS, "peak": 0.02, "warmup_steps": 5, "ema_decay": 0.7, **changes})
    config = settings_of(recipe, accumulate=how.get("accumulate", 1))
    config.run.skip_nonfinite = 5
    config.optimization.layer_decay = how.get("layer_decay")
    config.speed.precision = how.get("precision", "fp32")
    config.distillation.attention_distillation_weight = how.get("attention", 0.0)
    config.distillation.feature_distillation_weight = how.get("features", 0.0)
    config.distillation.teacher_patches = how.get("patches", 1.0)
    config.distillation.logit_standardization = how.get("standardized", False)
    return config


def trainer_of(case, device="cpu", *, cuda_graph="auto", compiled=False):
    make, teacher, *_ = CASES[case]
    config, teacher = settings(case), teacher and teacher()
    config.speed.cuda_graph, config.speed.compile = cuda_graph, compiled
    for name in {"weight", "model"} & vars(teacher).keys() if teacher else ():
        setattr(teacher, name, getattr(teacher, name).to(device))
    trainer = Trainer(config, World(torch.device(device)), make(), teacher, steps_per_epoch=4)
    trainer.model.train()
    return trainer


def stream(case, spoiled=()):
    """STEPS batches, those of the steps `spoiled` with a weight that is not a number."""
    made, (*_, how) = [], CASES[case]
    for step, batch in enumerate((batches() * STEPS)[:STEPS]):
        generator = torch.Generator().manual_seed(step)
        lam, labels = batch.mix.lam.clone(), torch.randint(CLASSES, (BATCH,), generator=generator)
        if step in spoiled:
            lam[3] = NAN
        batch = batch._replace(labels=labels, mix=batch.mix._replace(lam=lam))
        if how.get("cached"):
            probabilities = torch.rand(BATCH, 2, generator=generator) / 2
            batch = BatchWithTargets(*batch, (torch.tensor([[0, 3]] * BATCH), probabilities))
        made.append(batch)
    return made


def compare(one, other, what):
    left, right = one.changed(), other.changed()
    assert left.keys() == right.keys()
    for kind in left:
        for a, b in zip(left[kind], right[kind], strict=True):
            assert torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9)), f"{kind}, {what}"


def walk(case, capture, spoiled=()):
    """Both ways side by side. Returns the trainer that was captured."""
    plain, graphed = trainer_of(case), trainer_of(case)
    graphed.capture_steps(capture)
    for step, batch in enumerate(stream(case, spoiled)):
        expected, got = plain.step(batch), graphed.step(batch)
        assert torch.equal(expected.nan_to_num(), got.nan_to_num()), f"step {step}"
        compare(plain, graphed, f"step {step}")
    assert plain.guard.count == len(spoiled) == graphed.guard.count
    assert plain.guard.rows[: len(spoiled), 0].tolist() == list(spoiled)
    return graphed


@pytest.mark.parametrize("case", CASES)
def test_replays_are_the_steps_to_the_bit(case):
    capture = Recorded()
    graphed = walk(case, capture, spoiled=(1, 7))
    assert capture.replays == STEPS - WARM_UP + 1  # the proof's too
    assert graphed.news == ["the step is one CUDA graph from here on; its first replay agreed with the step as it is"]


def test_a_step_that_was_left_out_proves_nothing():
    capture = Recorded()
    walk("lamb, soft", capture, spoiled=(0, 2, 3))
    assert capture.replays == STEPS - WARM_UP - 2 + 1


class Refuses(Recorded):
    """Cannot capture, and finds out in the middle."""

    def record(self, call):
        def stop(*_):
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

        hook = self.parameter.register_hook(stop)
        try:
            return super().record(call)
        finally:
            hook.remove()


@pytest.mark.parametrize("case", ["adamw, hard, accumulated, clipped", "fp16", "attention"])
def test_without_a_capture_the_steps_go_on(case, monkeypatch):
    capture = Refuses()
    make = Trainer.capture_steps

    def capture_steps(self, capture):
        capture.parameter = list(self.model.parameters())[3]
        make(self, capture)

    monkeypatch.setattr(Trainer, "capture_steps", capture_steps)
    graphed = walk(case, capture)
    (sentence,) = graphed.news
    assert "not permitted" in sentence and "more lines" not in sentence and capture.replays == 0
    assert all(parameter.grad is None for parameter in graphed.model.parameters())


class Forgets(Recorded):
    """A replay that is not the step: calls of `name` keep the result of the capture."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def record(self, call):
        replay, result = super().record(call)
        kept = [call for call in self.tape.calls if self.name not in str(call[0])]
        assert len(kept) < len(self.tape.calls)
        self.tape.calls = kept
        return replay, result


# The images, the noise's decision, the rate of learning, the optimizer, the moving average, the log's sums.
@pytest.mark.parametrize("name", ["mix_normalize", "lt.Tensor", "copy_", "_fused_adamw_", "_fused_sgd_", "where"])
def test_a_replay_that_differs_is_not_trusted(name):
    capture = Forgets(name)
    (sentence,) = walk("adamw, hard, accumulated, clipped", capture).news
    assert "differs" in sentence and "without one" in sentence and capture.replays == 1


def test_a_batch_of_another_shape_is_a_step_as_it_is():
    plain, graphed = trainer_of("sgd, labels"), trainer_of("sgd, labels")
    graphed.capture_steps(capture := Recorded())
    seen = stream("sgd, labels")
    half = seen[0]._replace(mix=None)
    for batch in [*seen[:6], half, seen[6]]:
        assert torch.equal(plain.step(batch), graphed.step(batch))
    compare(plain, graphed, "after all")
    assert capture.replays == 1 + 4


def test_where_there_is_no_graph():
    trainer = trainer_of("sgd, labels")
    assert trainer.graph is None  # on a CPU
    trainer.config.speed.cuda_graph = "on"
    for world in (World(torch.device("cpu")), World(torch.device("cuda", 0), world_size=2)):
        with pytest.raises(UserError, match="one process on a GPU"):
            run.set_up(trainer.config, world)


@pytest.mark.parametrize("case", CASES)
def test_a_step_asks_nothing_of_the_host(case):
    trainer, seen = trainer_of(case), stream(case)
    for batch in seen[:2]:
        trainer.step(batch)
    inputs = trainer.inputs(seen[2])
    before = {kind: [x.data_ptr() for x in tensors] for kind, tensors in trainer.changed().items()}
    with DeviceOnly(draws=case == "a model that draws for itself") as mode:
        losses = trainer.compute(inputs, trainer.world.mean)
    # Nothing that the step has made is left but what it returns, and what it changes is where it was.
    assert mode.outlive() == 1 and losses.shape == (5,)
    assert before == {kind: [x.data_ptr() for x in tensors] for kind, tensors in trainer.changed().items()}


OFFENCES = {
    "item": lambda t: t.sums_.item(),
    "nonzero": lambda t: t.sums_.nonzero(),
    "mask": lambda t: t.state.sums[t.state.sums > 0],
    "a constant of the host's": lambda t: torch.tensor([1.0]),
    "a draw": lambda t: torch.rand(3),
}


@pytest.mark.parametrize("what", OFFENCES)
def test_what_a_step_must_not_do_is_noticed(what):
    trainer = trainer_of("sgd, labels")
    trainer.sums_ = trainer.state.sums[0]
    add = trainer.state.add

    def offend(losses, hold):
        OFFENCES[what](trainer)
        add(losses, hold)

    trainer.state.add = offend
    with pytest.raises(Forbidden), DeviceOnly():
        trainer.compute(trainer.inputs(stream("sgd, labels")[0]), trainer.world.mean)


def test_what_outlives_a_step_is_noticed():
    trainer = trainer_of("sgd, labels")
    trainer.step(stream("sgd, labels")[0])
    kept = SimpleNamespace()
    add = trainer.state.add

    def keep(losses, hold):
        add(losses, hold)
        trainer.state.sums = kept.sums = trainer.state.sums + 0

    trainer.state.add = keep
    inputs = trainer.inputs(copy.deepcopy(stream("sgd, labels")[1]))
    with DeviceOnly() as mode:
        losses = trainer.compute(inputs, trainer.world.mean)
    assert mode.outlive() == 2 and losses is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("cached, soft", "fp16")])
def test_a_real_graph_is_the_step(case, compiled):
    """To rounding: some sums on a GPU have no fixed order."""
    device = torch.device("cuda", 0)
    plain, graphed = (trainer_of(case, device, cuda_graph=how, compiled=compiled) for how in ("off", "on"))
    assert plain.graph is None and graphed.graph is not None
    for step, batch in enumerate(stream(case, spoiled=(1, 7))):
        batch = pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), batch)
        expected, got = plain.step(batch), graphed.step(batch)
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02, equal_nan=True, msg=f"step {step}")
    assert graphed.graph.replay is not None, graphed.news
    assert graphed.guard.count == 2 and graphed.guard.rows[:2, 0].tolist() == [1, 7]
    for one, other in zip(plain.ema.parameters(), graphed.ema.parameters()):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)
