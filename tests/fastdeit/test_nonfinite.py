"""A step that is not finite: kept from the weights, named, saved for repetition, or skipped as often as allowed."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastdeit.config import Config
from fastdeit.training import checkpointing
from fastdeit.training.nonfinite import TERMS, Guard, NonFinite
from fastdeit.training.optimizer import Update, build_optimizer

from .runs import RANDOM, assert_same, lines, run, step_of

NAN, INF = float("nan"), float("inf")


class Poison:
    """on_micro_batch: spoil a term of the loss, or the gradient, in the batches of certain steps."""

    def __init__(self, steps, what="class term"):
        self.steps, self.what, self.on, self.trainer = set(steps), what, False, None

    def __call__(self, trainer):
        if trainer is not self.trainer:
            self.trainer = trainer
            trainer.objective = self.spoil(trainer.objective, self.what)
        self.on = trainer.state.step in self.steps

    def spoil(self, objective, what):
        def spoiled(*args):
            loss, terms = objective(*args)
            if not self.on:
                return loss, terms
            if what == "gradient":
                loss.register_hook(lambda gradient: gradient * INF)
                return loss, terms
            return loss * NAN, torch.where(torch.tensor([name == what for name in TERMS[1:]]), NAN, terms)

        return spoiled


@pytest.fixture(scope="module")
def straight(colors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(*RANDOM, "--data-path", colors, "--output-dir", folder)
    return folder


@pytest.mark.parametrize(
    "what, words, lag",
    [
        ("class term", "class term is nan", 0),
        ("teacher term", "teacher term is nan", 2),
        ("loss", "the loss is nan", 1),
        ("gradient", "the gradient's norm is", 2),
    ],
)
def test_stops_before_the_update(straight, colors, tmp_path, monkeypatch, what, words, lag):
    monkeypatch.setitem(checkpointing.LAG, "cpu", lag)  # as on a GPU, where the host reads some steps later
    folder = tmp_path / "run"
    command = [*RANDOM, "--data-path", colors, "--output-dir", folder]
    with pytest.raises(NonFinite) as error:
        run(*command, on_micro_batch=Poison([4], what))
    message = str(error.value)
    assert words in message and "step 4" in message and f"--resume {folder}" in message
    # The names in the message and in the file are those of the batch.
    record = json.loads((folder / "nonfinite.jsonl").read_text())
    assert record["step"] == 4 and not record["skipped"] and len(record["ranks"][0]["files"]) == 12
    assert all(str(colors) in name for name in record["ranks"][0]["files"])
    assert record["ranks"][0]["files"][0] in message
    # The state is that before the step: repeated without the poison, the run ends as if nothing had happened.
    assert step_of(folder) == 4
    run("--resume", folder)
    assert_same(straight, folder)


def test_the_same_step_stops_again(colors, tmp_path):
    folder = tmp_path / "run"
    command = [*RANDOM, "--data-path", colors, "--output-dir", folder, "--resume", "auto"]
    for _ in range(2):
        with pytest.raises(NonFinite, match="step 0"):
            run(*command, on_micro_batch=Poison([0]))
        assert step_of(folder) == 0


@pytest.mark.parametrize("lag", [0, 2])
def test_skips_as_many_as_allowed(colors, tmp_path, monkeypatch, lag, capfd):
    monkeypatch.setitem(checkpointing.LAG, "cpu", lag)
    folder = tmp_path / "run"
    command, poison = [*RANDOM, "--data-path", colors, "--output-dir", folder], Poison([1, 2, 5, 7])
    with pytest.raises(NonFinite, match="step 7"):
        run(*command, "--skip-nonfinite", 3, on_micro_batch=poison)
    assert step_of(folder) == 7
    records = [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()]
    assert [(record["step"], record["skipped"]) for record in records] == [(1, True), (2, True), (5, True), (7, False)]
    assert capfd.readouterr().out.count("warning: step") == 3
    for name in ("model", "ema"):
        assert all(value.isfinite().all() for value in load_file(folder / "last" / f"{name}.safetensors").values())
    # One more is allowed now; what was skipped before still counts.
    with pytest.raises(NonFinite, match="step 7"):
        run("--resume", folder, "--skip-nonfinite", 3, on_micro_batch=poison)
    run("--resume", folder, "--skip-nonfinite", 4, on_micro_batch=poison)
    losses = [line["loss"] for line in lines(folder) if line["kind"] == "train"]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)  # skipped steps are not in the mean


def test_a_skipped_step_changes_nothing(colors, tmp_path):
    """Not even the running statistics of a batch norm, nor the moments of the optimizer."""
    seen, poison = [], Poison([1])

    def note(trainer):
        seen.append({name: value.clone() for name, value in flat(trainer.tensors()).items()})
        poison(trainer)

    run(
        *RANDOM, "--data-path", colors, "--output-dir", tmp_path / "run", "--skip-nonfinite", 1, "--epochs", 1,
        "--model", "test_resnet", "--input-size", 32, on_micro_batch=note,
    )  # fmt: skip
    _, before, after = seen
    assert before.keys() == after.keys() and any("running_mean" in name for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def flat(tree, prefix=""):
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {name: value for key, item in items for name, value in flat(item, f"{prefix}/{key}").items()}


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_every_optimizer_holds_still(name):
    config = Config()
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    optimizer = build_optimizer(model, name, lr=0.1, weight_decay=0.05, eps=1e-8, betas=(0.9, 0.999))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    update = Update(model, ema, optimizer, scaler, Guard(torch.device("cpu"), tolerated=5), config)

    def step(factor):
        update.begin()
        loss = model(torch.randn(8, 3)).square().mean() * factor
        loss.backward()
        losses = loss.detach().expand(len(TERMS))
        return update.apply(torch.tensor([0, 0.1, 0.9], dtype=torch.float64), losses, losses).item()

    def state():
        return [
            value.clone() for value in flat([model.state_dict(), ema.state_dict(), optimizer.state_dict()]).values()
        ]

    assert step(NAN) == 1  # the very first, which makes the optimizer's state
    assert all(not value.any() for value in flat(optimizer.state_dict()["state"]).values())
    assert step(1.0) == 0
    before = state()
    assert step(NAN) == 1
    assert all(torch.equal(one, other) for one, other in zip(before, state(), strict=True))
    assert step(1.0) == 0
    assert not all(torch.equal(one, other) for one, other in zip(before, state(), strict=True))


def test_the_scaler_may_reach_too_high():
    """With fp16 an infinite gradient of a finite loss lowers the scale; that step is left out, and is no incident."""
    guard = Guard(torch.device("cpu"), tolerated=0)
    finite, infinite, steps = torch.ones(len(TERMS)), torch.tensor(INF), torch.arange(4).double()
    assert guard.hold(steps[0], finite, finite, infinite, excused=torch.tensor(True)) == 1 and guard.count == 0
    assert guard.hold(steps[1], finite, finite, torch.tensor(1.0), excused=torch.tensor(True)) == 0
    assert guard.hold(steps[2], finite * NAN, finite, infinite, excused=torch.tensor(True)) == 1 and guard.count == 1
    assert guard.hold(steps[3], finite, finite, torch.tensor(1.0)) == 1  # held for good
    assert guard.incident(0)[0] == 2
