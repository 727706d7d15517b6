"""The student's questions: every answer is carried out, computes the same, and stays with the run."""

import copy
import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastdeit import report, tune
from fastdeit.config import Config
from fastdeit.distributed import parallel
from fastdeit.distributed.world import World
from fastdeit.models.build import create_model
from fastdeit.training import student_tuning
from fastdeit.training.student_tuning import Arrangement
from fastdeit.training.trainer import Trainer
from fastdeit.tuning import Tuner, cache, of_run, timing

from .conftest import refused
from .processes import start_ranks
from .runs import RANDOM, assert_same, run, run_until

CPU = World(torch.device("cpu"))
LAST = "attention of the last block"
NANO, CNN = "deit_nano_distilled_patch4_16", "test_resnet"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """One whose cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def favour(monkeypatch):
    """The named candidates win, whatever the time that they really take."""

    def winning(*names):
        real = in_turns

        def fixed(calls, *options, **more):
            return real(calls, *options, **more) | {name: 1e-4 for name in names if name in calls}

        monkeypatch.setattr(timing, "in_turns", fixed)

    in_turns = timing.in_turns
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    return winning


def asked(name, tmp_path, **speed):
    """A model, the arrangement and the choices for it."""
    pytest.importorskip("timm")
    config = Config()
    config.model.model, config.data.input_size, config.data.batch_size = name, 16, 4
    vars(config.speed).update(speed)
    torch.manual_seed(0)
    model = create_model(name, num_classes=3)
    tuner = Tuner(CPU, measures=True, file=tmp_path / "tuning.json")
    arrangement = student_tuning.ask(tuner, model, config)
    return config, model, arrangement, {choice.question: choice for choice in tuner.choices}


def logits_and_gradients(model):
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    logits = model.train()(images.to(memory_format=torch.channels_last))
    logits = torch.cat(logits) if isinstance(logits, tuple) else logits
    gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    return [logits, *gradients]


def test_each_candidate_of_a_transformer_computes_the_same(tmp_path, favour):
    favour("product", "sdpa")
    _, plain, _, choices = asked(NANO, tmp_path)
    assert choices.keys() == {"patch embedding", "attention", LAST}
    assert not plain.patch_embed.as_convolution and plain.implementation.attention == "sdpa"
    favour("convolution", "math")
    (tmp_path / "tuning.json").unlink()
    _, other, _, choices = asked(NANO, tmp_path)
    assert other.patch_embed.as_convolution and other.implementation.attention == "math"
    assert all(row.ms > 0 and not row.excluded for choice in choices.values() for row in choice.rows)
    for one, another in zip(logits_and_gradients(plain), logits_and_gradients(other), strict=True):
        torch.testing.assert_close(one, another, rtol=1e-3, atol=1e-5)
    assert plain.state_dict().keys() == other.state_dict().keys()


def test_named_attention_is_not_asked_about(tmp_path, favour):
    favour("math")
    _, model, _, choices = asked(NANO, tmp_path, attention="sdpa")
    assert "attention" not in choices and model.implementation.attention == "sdpa"


@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
def test_a_convolutional_students_weights_lie_as_was_chosen(tmp_path, favour, name):
    favour(name)
    config, model, arrangement, choices = asked(CNN, tmp_path)
    assert choices.keys() == {"student's memory format"} and choices["student's memory format"].chosen == name
    statistics = copy.deepcopy(model.bn1.running_mean)
    trainer = Trainer(config, CPU, model, None, steps_per_epoch=1, arrangement=arrangement)
    for weights in (trainer.model, trainer.ema):
        kernels = [p for p in weights.parameters() if p.ndim == 4 and p.shape[2] > 1]
        assert all(p.is_contiguous() == (name == "contiguous") for p in kernels) and kernels
    assert torch.equal(model.bn1.running_mean, statistics)  # what is timed is a copy


@pytest.mark.parametrize("number", [1, 2])
def test_threads_are_chosen_where_nobody_has_set_them(tmp_path, favour, monkeypatch, number):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(student_tuning, "_threads_at_first", lambda: 2)
    used = []
    monkeypatch.setattr(  # the model itself is slow on more threads than cores
        student_tuning, "forward_backward", lambda *_: lambda: used.append(torch.get_num_threads()) or torch.ones(1)
    )
    favour(str(number))
    try:
        choices = asked(NANO, tmp_path)[3]
        assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(1)
    assert [row.candidate for row in choices["threads"].rows] == ["2", "1"] and {*used} == {1, 2}
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert "threads" not in asked(NANO, tmp_path)[3] and torch.get_num_threads() == 1


def test_combo_kernels_reach_inductor(monkeypatch):
    """Only a GPU has such kernels; what is asked there, and what becomes of the answer."""
    question, gpu = {}, World(torch.device("cuda"))

    def choose(name, candidates, **more):
        question[name] = (list(candidates), more["default"])
        return SimpleNamespace(chosen="on")

    config, arrangement = Config(), Arrangement.default(gpu.device)
    tuner, model = SimpleNamespace(world=gpu, choose=choose), create_model(NANO)
    config.speed.compile = False
    student_tuning.combo_kernels(tuner, model, config, arrangement)
    assert question == {} and arrangement.inductor == {}
    config.speed.compile = True
    student_tuning.combo_kernels(tuner, model, config, arrangement)
    assert question == {"combo kernels": (["off", "on"], "off")}
    assert arrangement.inductor == {"combo_kernels": True} and arrangement.memory_format == torch.channels_last
    seen = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, options, dynamic: seen.append(options))
    parallel.compile_model(model, CPU, "ddp", arrangement.inductor)
    assert seen == [{"combo_kernels": True}]


# ---------------------------------------------------------------------------------------------------------------------
# As part of a run


def tuning_of(folder):
    return json.loads((folder / "last" / "config.json").read_text())["tuning"]


def chosen(folder):
    return {choice["question"]: (choice["chosen"], choice["origin"]) for choice in tuning_of(folder)}


def test_a_resumed_run_keeps_what_was_chosen_when_it_was_started(colors, tmp_path, monkeypatch, favour, capfd):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    arguments = [*RANDOM, "--data-path", colors, "--tune", "fresh"]
    favour("convolution", "math")
    run(*arguments, "--output-dir", whole)
    measured = {"patch embedding": ("convolution", "measured")} | dict.fromkeys(
        ("attention", LAST), ("math", "measured")
    )
    assert chosen(whole) == measured and json.loads((whole / "tuning.json").read_text()) == tuning_of(whole)
    assert "convolution" in capfd.readouterr().out

    run_until(monkeypatch, 4, *arguments, "--output-dir", stopped)
    favour("product", "sdpa")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of another machine"))
    run("--resume", stopped)
    assert chosen(stopped) == {question: (name, "checkpoint") for question, (name, _) in measured.items()}
    assert_same(whole, stopped)
    assert not (tmp_path / "of another machine").exists()

    # On another GPU, or with another version, the choice does not exist.
    capfd.readouterr()
    (stopped / "summary.json").unlink()
    here = cache.circumstances(CPU.device)
    monkeypatch.setattr(cache, "circumstances", lambda device: here | {"device": "NVIDIA X"})
    run("--resume", stopped, "--tune", "auto", "--dry-run")
    said = capfd.readouterr().out
    assert "the checkpoint's choice, math, was made elsewhere (device CPU" in said and "here NVIDIA X)" in said
    assert "attention: sdpa (not measured" in said  # on a CPU


@pytest.mark.parametrize(
    ("tune", "typed", "resumed", "mode", "takes"),
    [
        ("auto", (), True, "auto", True), ("fresh", (), True, "auto", True),
        ("fresh", ("--tune",), True, "fresh", False), ("off", (), True, "off", False),
        ("fresh", (), False, "fresh", False),
    ],
)  # fmt: skip
def test_a_resumed_run_measures_again_only_where_it_is_told_to_now(tune, typed, resumed, mode, takes):
    config = Config()
    config.speed.tune, config.typed = tune, frozenset(typed)
    saved = {"tuning": [{"question": "attention"}]} if resumed else None
    tuner = of_run(config, CPU, saved)
    assert tuner.mode == mode and bool(tuner.earlier) == takes
    assert of_run(config, CPU, {"step": 3}).earlier == ()  # of an earlier version


@pytest.mark.parametrize(("steps", "measures"), [(999, False), (1000, True), (None, True)])
def test_a_short_run_on_a_gpu_measures_nothing(monkeypatch, tmp_path, steps, measures):
    gpu = World(torch.device("cuda"))
    monkeypatch.setattr(cache, "circumstances", lambda device: {"device": "X"})
    monkeypatch.setattr(
        "fastdeit.tuning.choose._Measurement.choose", lambda self, begun, *_: replace(begun, chosen="b")
    )
    candidates = {"a": lambda: None, "b": lambda: None}
    tuner = of_run(Config(), gpu, None, steps=steps)
    choice = tuner.choose("which", candidates, default="a", key={}, dtype=torch.float16)
    assert choice.chosen == ("b" if measures else "a")


def test_two_ranks_take_one_word(colors, tmp_path):
    flags = [*RANDOM, "--batch-size", "6", "--epochs", "1", "--data-path", colors, "--output-dir", tmp_path / "run"]
    ranks = start_ranks(2, *flags, "--tune", "fresh", logs=tmp_path, XDG_CACHE_HOME=tmp_path / "cache")
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    assert {origin for _, origin in chosen(tmp_path / "run").values()} == {"measured"}
    assert "attention: " in ranks[0].text and "attention: " not in ranks[1].text


def test_what_was_measured_in_advance_is_taken(colors, tmp_path, favour, cli, request):
    """tune, then a run with the same flags, whose report shows the table."""
    flags = [*RANDOM, "--epochs", "1", "--data-path", colors, "--num-workers", "1"]
    flags += ["--distillation-type", "hard", "--teacher-path", request.getfixturevalue("run")]
    favour("product", "math")
    code, out, _ = cli(tune.main, *flags, "--record", tmp_path / "records" / "here.csv")
    assert code == 0 and "attention: math (measured in" in out
    with (tmp_path / "records" / "here.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["question"], row["candidate"], row["remark"]) for row in rows[:4]] == [
        ("patch embedding", "product", "chosen, default"), ("patch embedding", "convolution", ""),
        ("attention", "sdpa", "default"), ("attention", "math", "chosen"),
    ]  # fmt: skip
    described = json.loads((tmp_path / "records" / "here.json").read_text())
    assert described["torch"] == torch.__version__ and "fastdeit.tune" in described["command"]

    run(*flags, "--output-dir", tmp_path / "run")
    made = chosen(tmp_path / "run")
    assert made["attention"] == ("math", "cache") and made["teacher"] == ("plain", "default")
    page = report.write(tmp_path / "run").read_text()
    assert "What was measured and chosen" in page and "remembered on this machine" in page
    assert "math attention" in page


@pytest.mark.parametrize("flags", [["--tune", "off"], ["--resume", "x"], ["--record", "x.txt"]])
def test_tune_refuses_what_makes_no_sense(cli, flags, colors):
    refused(cli, tune.main, "--recipe", "demo", "--data-path", colors, *flags, words=[flags[0]])


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_on_a_cpu_only_fresh_measures(colors, tmp_path, monkeypatch, mode):
    monkeypatch.setattr(timing, "in_turns", lambda *_, **__: pytest.fail("measured"))
    run(*RANDOM, "--epochs", "1", "--data-path", colors, "--output-dir", tmp_path / "run", "--tune", mode)
    expected = {"patch embedding": ("product", "default")} | dict.fromkeys(("attention", LAST), ("sdpa", "default"))
    assert chosen(tmp_path / "run") == ({} if mode == "off" else expected)
