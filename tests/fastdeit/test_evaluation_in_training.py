"""The evaluations of a run: each image is decoded once, one compiled graph serves weights and average, and the log,
the best checkpoint and resuming cope with epochs that are not evaluated."""

import copy
import io
import json
from contextlib import nullcontext, redirect_stdout
from functools import partial
from unittest import mock

import pytest
import torch

from fastdeit.config import Config
from fastdeit.data import prepare
from fastdeit.distributed.world import World
from fastdeit.evaluation.metrics import Tally
from fastdeit.models.deit import create_model
from fastdeit.pipelines import SyntheticIndex, eval_loader
from fastdeit.training import evaluation
from fastdeit.training.loop import ends_part

from .runs import RANDOM, assert_same, lines, run, run_until, step_of

HERE = World(torch.device("cpu"))
IMAGES, BATCH = 20, 8  # the last batch is padded


def to_input(batch):
    return prepare(batch, (0.5,) * 3, (0.5,) * 3, torch.float32)


@pytest.fixture
def models():
    """A model in train(), with drop path that would show, and another as its moving average."""
    torch.manual_seed(0)
    model = create_model("deit_nano_distilled_patch4_16", num_classes=5, drop_path=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    average = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.8)
    return model.train(), average


@pytest.fixture
def loader(monkeypatch):
    made = eval_loader(SyntheticIndex(IMAGES, classes=5), batch_size=BATCH, input_size=16)
    noise = torch.randint(0, 256, (3, BATCH, 16, 16, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    monkeypatch.setattr(made.prefetcher.decoder, "collect", lambda plan: noise[plan.step])
    return made


def by_hand(model, loader):
    model, tally = copy.deepcopy(model).eval(), Tally()
    for batch in loader:
        with torch.no_grad():
            cls_logits, dist_logits = model.forward_heads(to_input(batch))
        tally.add({"cls": cls_logits, "dist": dist_logits, "both": (cls_logits + dist_logits) / 2}, batch.labels)
    return tally.result(HERE)


def evaluations(model, ema, *, compile=False):
    config = Config()
    config.speed.compile = compile
    return evaluation.Evaluation(model, ema, config, HERE)


def test_each_batch_is_prepared_once_for_both(models, loader):
    model, ema = models
    evaluate, prepared = evaluations(model, ema), []
    result = evaluate(loader, lambda batch: prepared.append(len(batch.labels)) or to_input(batch), nullcontext)
    assert prepared == [BATCH] * 3
    assert result == {"model": by_hand(model, loader), "ema": by_hand(ema, loader)}
    assert result["model"] != result["ema"] and result["model"]["cls"]["loss"] > 0
    assert all(module.training for module in model.modules())
    assert evaluations(model, None)(loader, to_input, nullcontext) == {"model": result["model"]}


def test_it_sees_the_weights_as_they_are(models, loader):
    model, _ = models
    evaluate = evaluations(model, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.randn(2, 3, 16, 16))[0].square().sum().backward()
    before = evaluate(loader, to_input, nullcontext)
    optimizer.step()
    after = evaluate(loader, to_input, nullcontext)
    assert before != after == {"model": by_hand(model, loader)}
    for parameter in model.parameters():
        parameter.data = 0.5 * parameter.data  # in other memory
    assert evaluate(loader, to_input, nullcontext) == {"model": by_hand(model, loader)}
    own = evaluate.modules["model"]
    assert not any(parameter.requires_grad for parameter in own.parameters())
    assert {p.data_ptr() for p in own.parameters()} == {p.data_ptr() for p in model.parameters()}


def test_one_graph_serves_both_and_every_evaluation(models, loader, monkeypatch):
    model, ema = models
    graphs = []

    def counting(graph, inputs):
        graphs.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    torch._dynamo.reset()
    evaluate, optimizer = evaluations(model, ema, compile=True), torch.optim.SGD(model.parameters(), lr=0.5)
    model.compile(backend=counting)
    for _ in range(2):
        optimizer.zero_grad()
        sum(map(torch.sum, model(torch.ones(2, 3, 16, 16), torch.ones(2, 6, 2)))).backward()
        optimizer.step()
        expected = {"model": by_hand(model, loader), "ema": by_hand(ema, loader)}
        found = evaluate(loader, to_input, nullcontext)
        for source, heads in expected.items():
            for head, figures in heads.items():
                assert found[source][head] == pytest.approx(figures, rel=1e-5)
    assert len(graphs) == 2  # the training step's, and the evaluation's


# ---------------------------------------------------------------------------------------------------------------------
# Every N epochs

EVERY_SECOND = [*RANDOM, "--epochs", "5", "--eval-every", "2"]


@pytest.fixture(scope="module")
def sparse(colors, tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("sparse") / "run", io.StringIO()
    with redirect_stdout(said), mock.patch("fastdeit.training.log.QUICK_EPOCH_SECONDS", 0):
        run(*EVERY_SECOND, "--data-path", colors, "--output-dir", folder)
    (folder / "said.txt").write_text(said.getvalue())
    return folder


def test_every_second_epoch_and_the_last_are_evaluated(sparse, colors, tmp_path):
    run(*EVERY_SECOND, "--data-path", colors, "--output-dir", tmp_path / "run", "--eval-every", 1)
    every = {line["epoch"]: line for line in lines(tmp_path / "run") if line["kind"] == "eval"}
    found = [line for line in lines(sparse) if line["kind"] == "eval"]
    assert [line["epoch"] for line in found] == [1, 3, 4] and sorted(every) == [0, 1, 2, 3, 4]
    assert all(line == every[line["epoch"]] for line in found)
    assert [line for line in lines(sparse) if line["kind"] == "train"] == [
        line for line in lines(tmp_path / "run") if line["kind"] == "train"
    ]
    assert json.loads((sparse / "summary.json").read_text()) == found[-1]["model"]
    best = max(max(line["model"].values()) for line in found)
    described = json.loads((sparse / "best" / "config.json").read_text())
    assert max(head["top1"] for head in described["accuracy"]["model"].values()) == best


def test_an_epoch_without_accuracy_is_a_line_too(sparse):
    said = [line for line in (sparse / "said.txt").read_text().splitlines() if line.startswith("epoch ")]
    assert [line[:9] for line in said] == [f"epoch {n}/5" for n in range(1, 6)]
    assert [("top-1 %" in line) for line in said] == [False, True, False, True, True]
    assert all("loss" in line and "left" in line for line in said)


@pytest.mark.parametrize("step", [2, 6])  # at the end of an epoch that is not evaluated, and within one
def test_resuming_where_epochs_are_not_evaluated(sparse, colors, tmp_path, monkeypatch, step):
    folder = tmp_path / "run"
    run_until(monkeypatch, step, *EVERY_SECOND, "--data-path", colors, "--output-dir", folder)
    assert step_of(folder) == step + 1
    run("--resume", folder)
    assert_same(sparse, folder)


def test_curves_and_report_of_such_a_run(sparse):
    from fastdeit.checkpoint import metrics_log
    from fastdeit.evaluation import charts
    from fastdeit.report.record import Record

    training, evaluated = metrics_log.read(sparse / "metrics.jsonl")
    top1 = {chart.title: chart for chart in charts.of_training(training, evaluated)}["Validation top-1"]
    assert [step for step, _ in top1.lines[0].points] == [6, 12, 15]
    record = Record.read(sparse)
    assert record.best("model", "cls")[1] in (2, 4, 5) and record.is_detailed


# ---------------------------------------------------------------------------------------------------------------------
# The lines of the log


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 49, 50, 60, 74, 76, 99, 101, 1251])
def test_lines_of_the_log_stand_for_equal_parts(steps_per_epoch):
    ends = [step for step in range(1, 3 * steps_per_epoch + 1) if ends_part(step, steps_per_epoch)]
    parts = [end - start for start, end in zip([0, *ends], ends)]
    assert all(epoch * steps_per_epoch in ends for epoch in (1, 2, 3))
    assert max(parts) - min(parts) <= 1
    assert (steps_per_epoch < 75 and len(parts) == 3) or (37 <= min(parts) and max(parts) <= 75)
