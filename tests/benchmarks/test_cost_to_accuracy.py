"""The study of what an accuracy costs: its meter, its record and its table, on made-up results; the estimate."""

import json
import math
import shlex

import pytest
import torch
from docstring_parser import parse_from_object
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost_to_accuracy, imagenet_cost, metered
from benchmarks.cost_to_accuracy import LEVERS, PLAIN, RECORDS, STUDENT, TARGETS, Results, curve, reached
from benchmarks.studies import mean_and_error
from fastdeit.cli import parse_config
from fastdeit.config import Distillation, Model, Optimization
from fastdeit.config_check import check, unread
from fastdeit.training.loop import Loop
from fastdeit.training.muon import orthogonalise
from tests.fastdeit.conftest import colors  # noqa: F401
from tests.fastdeit.runs import RANDOM, run


@pytest.mark.parametrize(
    "target, cost", [(50, 10.0), (60, 10.0), (65, 15.0), (70, 20.0), (75, 40.0), (80, 50.0), (81, None)]
)
def test_the_cost_of_an_accuracy_is_read_off_the_line(target, cost):
    assert reached([10.0, 20.0, 30.0, 50.0], [60.0, 70.0, 70.0, 80.0], target) == cost


def test_a_curve_adds_up_what_the_steps_cost(tmp_path):
    """Three epochs of 10 steps; the second was stopped after 4 of its steps, and 2 of those were made again."""
    lines = [
        {"kind": "eval", "step": 10 * epoch + 10, "epoch": epoch, "model": {"cls": 0.1}, "ema": {"cls": 0.3, **both}}
        for epoch, both in enumerate(({}, {"both": 0.4}, {"both": 0.5}))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    costs = [(0, 10, 20.0), (1, 4, 12.0), (1, 8, 24.0), (2, 10, 40.0), (3, 0, 1.0)]
    (tmp_path / metered.FILE).write_text(
        "".join(json.dumps(dict(zip(("epoch", "steps", "cpu_seconds"), line))) + "\n" for line in costs)
    )
    assert curve(tmp_path) == [(1, 640, 20.0, 30.0), (2, 1280, 50.0, 40.0), (3, 1920, 90.0, 50.0)]


def test_a_run_is_metered(colors, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Loop, "train_epoch", Loop.train_epoch)  # as it was, afterwards
    metered.meter(tmp_path / metered.FILE)
    run(*RANDOM, "--data-path", colors, "--output-dir", tmp_path / "run", "--epochs", 2)
    lines = [json.loads(line) for line in (tmp_path / metered.FILE).read_text().splitlines()]
    assert [(line["epoch"], line["steps"]) for line in lines] == [(0, 3), (1, 3)]
    assert all(0 < line["cpu_seconds"] < 60 for line in lines)


@pytest.mark.parametrize("lever", LEVERS)
def test_a_levers_flags_all_have_an_effect(lever):
    config = parse_config(shlex.split(f"{STUDENT} {LEVERS[lever].format(teacher='run')} --epochs 10"))
    check(config)
    flags = {word for word in LEVERS[lever].split() if word.startswith("--")}
    assert not unread(config, flags) and config.data.input_size == 28


def points(*costs_and_scores):
    return [(i + 1, 100 * (i + 1), cost, score) for i, (cost, score) in enumerate(costs_and_scores)]


def test_the_table_has_paired_ratios_and_the_record_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(cost_to_accuracy, "TARGETS", (80.0,))
    results = Results(tmp_path / "record.csv")
    for seed, plain, muon in ((0, 40.0, 20.0), (1, 50.0, 50.0), (2, 60.0, 15.0)):
        results.add(PLAIN, seed, points((10.0, 70.0), (plain, 80.0)))
        results.add("muon", seed, points((10.0, 70.0), (muon, 80.0), (90.0, 82.0 + seed)))
    results.add("hard", 0, points((10.0, 70.0), (20.0, 79.0)))
    results.add("hard", 1, points((10.0, 70.0), (25.0, 90.0)))
    read = Results(tmp_path / "record.csv")
    assert read.curves == results.curves and read.has("muon", 2) and not read.has("muon", 3)
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in read.table().splitlines()}
    assert rows["| plain"] == ["200", "50", "50", "80.0 |"]
    # Ratios 1/2, 1 and 1/4: the logarithms' mean is log 0.5, their standard error log 2 / sqrt(3).
    assert rows["| muon"] == ["200 (x 1.00 ± 0.00)", "28 (x 0.50 ± 0.20)", "90", "83.0 (+3.0 ± 0.6) |"]
    assert rows["| hard"][:2] == ["150 (x 0.75), 1 of 2 seeds", "18 (x 0.35), 1 of 2 seeds"]
    assert "mean over 2 to 3 seeds" in read.in_words()
    read.summarise()
    assert (tmp_path / "record.md").read_text() == read.table() and (tmp_path / "record.png").stat().st_size > 5_000
    assert json.loads((tmp_path / "record.json").read_text())["levers"] == LEVERS


def test_a_lever_that_never_arrives(tmp_path, monkeypatch):
    monkeypatch.setattr(cost_to_accuracy, "TARGETS", (99.0,))
    results = Results(tmp_path / "record.csv")
    results.add("dkd", 0, points((10.0, 70.0), (20.0, 79.0)))
    assert "| dkd | not reached | not reached | 20 | 79.0 |" in results.table()


def test_a_ratio_is_of_a_seed_in_which_both_arrive(tmp_path):
    results = Results(tmp_path / "record.csv")
    results.add(PLAIN, 0, points((10.0, 70.0), (40.0, 80.0)))
    results.add(PLAIN, 1, points((10.0, 70.0), (40.0, 79.0)))
    for seed, cost in enumerate((20.0, 25.0, 30.0)):
        results.add("muon", seed, points((10.0, 70.0), (cost, 80.0)))
    assert results.log_ratios("muon", 80.0, 2) == [math.log(20 / 40)]


@pytest.mark.parametrize(
    "levers, group, name",
    [
        (["muon"], Optimization, "opt"),
        (["patch-drop 0.25", "patch-drop 0.5"], Model, "patch_drop"),
        (["curriculum"], Optimization, "curriculum"),
        (["soft, standardised"], Distillation, "logit_standardization"),
        (["soft, features"], Distillation, "feature_distillation_weight"),
    ],
)
def test_a_lever_that_does_not_pay_says_so_in_its_help(levers, group, name):
    """By the record: more CPU-seconds than the plain recipe to the higher accuracy, or not there with every seed."""
    results = Results(RECORDS / "cpu" / "cost_to_accuracy.csv")
    assert results.of(PLAIN).keys() == {0, 1, 2}
    pays = True
    for lever in levers:
        assert results.of(lever).keys() == results.of(PLAIN).keys()
        ratios = results.log_ratios(lever, TARGETS[-1], 2)
        mean, error = mean_and_error(ratios) if len(ratios) == 3 else (math.inf, 0)
        pays &= mean < error
    (text,) = (one.description for one in parse_from_object(group).params if one.arg_name == name)
    assert pays != ("did not pay" in " ".join(text.split()))


# The estimate


def test_what_is_counted_is_what_the_formulas_say():
    """DeiT-S, products and attention alone; the last block computes its prefix token only, and the images have no
    gradient."""
    width, depth = 384, 12

    def blocks(tokens):
        whole = 12 * tokens * width**2 + 2 * tokens**2 * width
        last = 2 * tokens * width**2 + (1 + 1 + 8) * width**2 + 2 * tokens * width  # keys and values of all tokens
        return (depth - 1) * whole + last

    def step(patches):
        return 6 * blocks(patches + 1) + 4 * 196 * 768 * width + 6 * 1000 * width

    assert imagenet_cost.step_flop() == pytest.approx(step(196), rel=0.03)
    assert imagenet_cost.step_flop(patch_drop=0.5) == pytest.approx(step(98), rel=0.03)
    assert imagenet_cost.teacher_flop() == pytest.approx(2 * 15.96e9, rel=0.01)  # timm's table of results
    total = 0
    for count, m, n in ((4 * 12, 384, 384), (2 * 12, 384, 1536)):
        with FlopCounterMode(display=False) as counter:
            orthogonalise(torch.empty(count, m, n, device="meta"))
        total += counter.get_total_flops()
    assert imagenet_cost.muon_flop() == total


def test_the_estimate_says_that_it_is_one():
    text = imagenet_cost.estimate()
    assert text.startswith("ESTIMATE") and "19.2 h" in text
    rows = {line.split(" | ")[0]: line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    hours = float(rows["| plain, 300 epochs"][3])
    assert hours == pytest.approx(300 * 1_281_167 / 5_560 / 3600, abs=0.1)
    assert rows["| plain, 300 epochs"][4] == f"{hours / (4.8 / 3.35):.1f} to {hours:.1f}"
    assert float(rows["| curriculum, the work of 100"][3]) == pytest.approx(hours / 3, rel=0.05)
