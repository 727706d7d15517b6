"""Several teachers: the mean of their probabilities, each with its own input and classes, in runs and caches."""

import json
import re

import pytest
import torch

from fastdeit import api, demo, recipes, teach, train
from fastdeit.cli import parse_config
from fastdeit.config import Config, Distillation
from fastdeit.config_check import check
from fastdeit.distill import logit_cache
from fastdeit.distill.teachers import Teachers
from fastdeit.distributed.world import World
from fastdeit.errors import UserError
from fastdeit.export import card
from fastdeit.tuning import Tuner

from . import logit_caches, runs
from .conftest import refused
from .logit_caches import cached, without
from .test_demo import trained  # noqa: F401
from .test_folding import pixels, with_statistics
from .test_teacher import IMAGENET, normalise, teacher

data_fixture, teacher_fixture = logit_caches.data_fixture, logit_caches.teacher_fixture


class Says:
    """A teacher with these probabilities for every image."""

    plain = None

    def __init__(self, *probabilities, name="it"):
        self.name, self.fingerprint, self.p = name, f"of {probabilities}", torch.tensor([probabilities])

    def __call__(self, images):
        return self.p.log().half() + 3  # a constant is no part of what it says

    def identity(self):
        return {"weights": self.fingerprint}

    def check(self, batches):
        return [f"teacher {self.name}"]


def test_the_mean_of_probabilities():
    pair = [Says(0.8, 0.2, name="a"), Says(0.4, 0.6, name="b")]
    logits = Teachers(pair, 1.0)(None)
    assert logits.dtype == torch.float32
    assert logits.softmax(1)[0].tolist() == pytest.approx([0.6, 0.4], rel=1e-3)
    # At tau 2 a teacher says p^(1/2): 2/3 and 1/3, then 0.4495 and 0.5505. Not what the mean at tau 1 has there.
    logits = Teachers(pair, 2.0)(None)
    assert (logits / 2).softmax(1)[0].tolist() == pytest.approx(
        [(2 / 3 + 0.449490) / 2, (1 / 3 + 0.550510) / 2], rel=1e-3
    )
    assert Teachers(pair, 1.0).name == "a and b"
    said = Teachers(pair, 1.0).check([])
    assert said[:2] == ["teacher a", "teacher b"] and "mean of the 2" in said[2]


def test_hard_labels_are_those_of_the_mean():
    three = Teachers([Says(0.5, 0.4, 0.1), Says(0.5, 0.4, 0.1), Says(0.05, 0.45, 0.5)], 1.0)
    assert three(None).argmax(1).tolist() == [1]  # of which no teacher thinks most


def test_each_has_its_own_size_and_normalisation():
    models = [with_statistics(name, num_classes=7) for name in ("test_resnet", "test_efficientnet")]
    same = {"mean": IMAGENET["student_mean"], "std": IMAGENET["student_std"]}
    pair = Teachers([teacher(models[0], input_size=64, **same), teacher(models[1])], 1.0)
    seen = normalise(pixels(), *IMAGENET.values())
    resized = torch.nn.functional.interpolate(seen, (64, 64), mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = (
            models[0](resized).softmax(1) + models[1](normalise(pixels(), (0.5,) * 3, (0.5,) * 3)).softmax(1)
        ) / 2
    torch.testing.assert_close(pair(seen).softmax(1), expected, atol=1e-5, rtol=1e-3)
    student = torch.randn(len(seen), 7, requires_grad=True)
    (student * pair(seen)).sum().backward()  # may be saved for a backward pass
    assert not pair(seen).requires_grad


def test_one_of_them_in_half_precision_is_compared_with_its_fp32():
    model = with_statistics("test_resnet", num_classes=7)
    said = Teachers([teacher(model), teacher(model, torch.bfloat16)], 1.0).check(iter([pixels(), pixels()]))
    assert ["agrees with fp32" in sentence for sentence in said[:2]] == [False, True]


def test_each_takes_a_layout_of_its_own_on_resume_too(tmp_path):
    def tuned(earlier=()):
        pair = [teacher(with_statistics(name, num_classes=7)) for name in ("test_resnet", "test_efficientnet")]
        tuner = Tuner(World(torch.device("cpu")), file=tmp_path / "choices.json", mode="auto", earlier=list(earlier))
        Teachers(pair, 1.0).tune(tuner, (2, 3, 32, 32), torch.float32, compiled=False)
        return tuner.to_json()

    first, second = tuned()
    assert first["question"] != second["question"]
    second = {**second, "chosen": "channels_last"}
    again = tuned([first, second])
    assert [(one["chosen"], one["origin"]) for one in again] == [
        ("plain", "checkpoint"),
        ("channels_last", "checkpoint"),
    ]


def test_another_teacher_is_another_identity():
    one, two = Says(0.8, 0.2), Says(0.4, 0.6)
    assert Teachers([one, two], 1.0).fingerprint != Teachers([one, Says(0.5, 0.5)], 1.0).fingerprint
    assert Teachers([one, two], 1.0).identity() == {"teachers": [one.identity(), two.identity()]}


def test_what_belongs_to_which():
    def of(**settings):
        return [
            (one.teacher_path, one.teacher_model, one.teacher_classes) for one in Distillation(**settings).teachers()
        ]

    assert of() == [(None, "regnety_160", None)]
    assert of(teacher_model=("a", "b")) == [(None, "a", None), (None, "b", None)]
    assert of(teacher_path=("x", "y"), teacher_model="a", teacher_classes="f") == [("x", "a", "f"), ("y", "a", "f")]
    assert of(teacher_path=("x", "y"), teacher_model=("a", "b"), teacher_classes=("f", "g")) == [
        ("x", "a", "f"), ("y", "b", "g"),
    ]  # fmt: skip
    for wrong, words in (
        ({"teacher_path": "x", "teacher_model": ("a", "b")}, "--teacher-model has 2 values for 1 teacher:"),
        ({"teacher_path": ("x", "y", "z"), "teacher_classes": ("f", "g")}, "--teacher-classes has 2 values for 3"),
    ):
        with pytest.raises(UserError, match=words):
            Distillation(**wrong).teachers()
        config = Config()
        config.distillation = Distillation(distillation_type="hard", **wrong)
        with pytest.raises(UserError, match=words):
            check(config)


def test_where_settings_are_written_and_read():
    given = {"teacher_path": ["runs/a", "runs/b"], "teacher_classes": "f"}
    assert api.arguments(given) == ["--teacher-path", "runs/a", "runs/b", "--teacher-classes", "f"]
    config = Config()
    config.distillation = Distillation(distillation_type="hard", teacher_path=("x/runs/a", "x/runs/b"))
    assert "| teacher | runs/a and runs/b |" in card._training(config.to_dict())
    assert Config.from_dict(config.to_dict()).distillation == config.distillation
    assert parse_config(["--data-path", "d", "--distillation-type", "hard", "--teacher-model", "a"]).distillation == (
        Distillation(distillation_type="hard", teacher_model="a")
    )


def test_the_demo_trains_each(trained):  # noqa: F811
    config = recipes.load("demo")
    config.distillation.teacher_model = ("test_resnet", "test_vit")
    paths = demo.with_digits(config, World(torch.device("cpu"))).distillation.teacher_path
    assert [path.split("-")[3] for path in paths] == ["test_resnet", "test_vit"]
    assert [settings.model.model for settings in trained] == ["test_resnet", "test_vit"]


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(name="flags", scope="module")
def flags_fixture(data, teacher, tmp_path_factory):
    """Of two teachers: the CNN, and a student of it."""
    other = tmp_path_factory.mktemp("other") / "run"
    arguments = [*without(logit_caches.RECIPE, "--distillation-type"), "--data-path", str(data)]
    runs.run(*arguments, "--distillation-type", "none", "--output-dir", other, "--epochs", 1)
    return [*arguments, "--distillation-type", "soft", "--teacher-path", str(teacher), str(other)]


def test_runs_live_resumed_and_from_a_cache(flags, tmp_path, monkeypatch, capsys):
    runs.run(*flags, "--epochs", 1, "--output-dir", tmp_path / "live")
    said = capsys.readouterr().out
    assert (
        len(re.findall("^teacher .* parameters, fp32", said, re.MULTILINE)) == 2 and "mean of the 2 teachers'" in said
    )
    assert "teacher" in json.loads((tmp_path / "live" / "summary.json").read_text())
    runs.run_until(monkeypatch, 2, *flags, "--epochs", 1, "--output-dir", tmp_path / "run")
    swapped = [flags[-1], flags[-1]]
    with pytest.raises(UserError, match=r"the teacher .* and .* is not the one"):
        runs.run("--resume", tmp_path / "run", "--teacher-path", *swapped)
    runs.run("--resume", tmp_path / "run")
    runs.assert_same(tmp_path / "live", tmp_path / "run")

    teach.store([*flags, "--views", "1", "--top", "3", "--output", str(tmp_path / "cache")])
    header = logit_cache.read_header(tmp_path / "cache")
    assert len(header["teacher"]["teachers"]) == 2 and " and " in header["teacher_name"]
    kept = cached([*flags[:-2], flags[-2]], tmp_path / "cache")
    runs.run(*kept, "--epochs", 1, "--output-dir", tmp_path / "cached")
    pairs = zip(runs.lines(tmp_path / "live"), runs.lines(tmp_path / "cached"), strict=True)
    for live, stored in (pair for pair in pairs if pair[0]["kind"] == "train"):
        assert [live[key] for key in runs.LOSSES] == pytest.approx([stored[key] for key in runs.LOSSES], rel=5e-3)


def test_what_several_cannot_do(flags, cli):
    refused(cli, train.main, *flags, "--attention-distillation-weight", 1, words=["one teacher"])
    refused(cli, train.main, *flags, "nowhere", words=["--teacher-path nowhere"])
