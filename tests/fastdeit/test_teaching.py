"""Runs with a teacher from end to end: what it leaves untouched, and what else a student can be taught with."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastdeit import teach, train
from fastdeit.cli import parse_config
from fastdeit.config import Config
from fastdeit.distributed.world import join
from fastdeit.models.build import build_student

from . import runs
from .conftest import SMALL, refused


@pytest.fixture(scope="module")
def teacher(colors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    arguments = (
        "--input-size 32 --batch-size 12 --epochs 4 --lr 4e-3 --unscale-lr --no-pretrained --num-workers 1".split()
    )
    config = parse_config(
        [*arguments, "--model", "test_resnet", "--data-path", str(colors), "--output-dir", str(folder)],
        recipe="teacher",
    )
    with join("cpu") as world:
        train.train(config, world)
    return folder


def run(cli, colors, folder, *arguments):
    """A short distilled run; returns its metrics.jsonl."""
    code, out, err = cli(
        train.main, *SMALL, "--epochs", 1, "--data-path", colors, "--output-dir", folder, "--distillation-type", "hard",
        *arguments,
    )  # fmt: skip
    assert code == 0, err
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], out


def test_the_teacher_is_in_nothing_that_is_trained_or_saved(colors, teacher, tmp_path):
    seen = []

    def remember(trainer):
        state = trainer.teacher.network.state_dict()
        seen.append((trainer, {name: value.clone() for name, value in state.items()}))

    folder = tmp_path / "run"
    arguments = [*SMALL, "--data-path", str(colors), "--output-dir", str(folder), "--teacher-path", str(teacher)]
    with join("cpu") as world:
        train.train(parse_config([*arguments, "--distillation-type", "hard"]), world, on_micro_batch=remember)
    trainer, before = seen[0]
    after = trainer.teacher.network.state_dict()
    assert before.keys() == after.keys() and len(before) > 20
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    frozen = list(trainer.teacher.network.parameters())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen)
    trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in trainer.model.parameters()}
    for name in ("model", "ema"):
        assert load_file(folder / "last" / f"{name}.safetensors").keys() == trainer.model.state_dict().keys()
    optimizer = torch.load(folder / "last" / "training.pt", weights_only=True)["optimizer"]
    assert len(optimizer["state"]) == len(trained)


def test_a_fitted_teacher_has_its_accuracy_printed_and_saved(colors, tmp_path, cli):
    folder = tmp_path / "teacher"
    code, out, err = cli(
        teach.main, "fit", "--data-path", colors, "--model", "test_resnet", "--output-dir", folder, "--no-pretrained",
        *"--input-size 16 --batch-size 12 --epochs 1 --warmup-epochs 0 --num-workers 1".split(),
    )  # fmt: skip
    assert code == 0, err
    top1 = json.loads((folder / "summary.json").read_text())["cls"]
    assert f"{100 * top1:.2f}" in out and "--teacher-path" in out
    saved = json.loads((folder / "last" / "config.json").read_text())
    assert saved["accuracy"]["model"]["cls"]["top1"] == top1 and saved["classes"] == ["blue", "green", "red"]


def test_a_student_with_one_head(colors, teacher, tmp_path, cli):
    for model, kind in (("deit_nano_patch4_16", "soft"), ("test_vit", "hard")):
        arguments = ["--model", model, "--distillation-type", kind, "--teacher-path", teacher]
        size = ["--input-size", "32", "--no-model-ema", "--patch-size", "16"] if model == "test_vit" else []
        records, _ = run(cli, colors, tmp_path / model, *arguments, *size)
        assert records[0]["teacher_loss"] > 0 and records[0]["class_loss"] > 0
        assert json.loads((tmp_path / model / "summary.json").read_text()).keys() == {"teacher", "cls"}


@pytest.mark.parametrize(
    "model, option, remedy",
    [
        ("test_resnet", ["--patch-size", "4"], "omit --patch-size"),
        ("vgg11", ["--drop-path", "0.1"], "give --drop-path 0"),
    ],
)
def test_options_a_timm_model_does_not_have(colors, cli, model, option, remedy):
    refused(cli, train.main, *SMALL, "--data-path", colors, "--model", model, *option, words=[model, remedy])


def test_images_without_labels(colors, teacher, tmp_path, cli):
    noise = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "more" / f"{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (20, 20, 3), np.uint8)).save(path)
    arguments = ["--teacher-path", teacher, "--unlabelled-path", tmp_path / "more", "--mixup", "0.8", "--cutmix", "1"]
    records, out = run(cli, colors, tmp_path / "run", *arguments, "--compare-undistilled")
    assert "60 training" in out and records[0]["step"] == 5  # 36 with labels and 24 without, in batches of 12
    assert np.isfinite(records[0]["loss"]) and records[0]["teacher_loss"] > 0
    # The same student from labels alone has as many steps, and every image in them has a label.
    alone = runs.lines(tmp_path / "run" / "undistilled")
    assert [line["step"] for line in alone] == [line["step"] for line in runs.lines(tmp_path / "run")]
    assert alone[0]["teacher_loss"] == 0 and alone[0]["loss"] == alone[0]["class_loss"]
    assert records[0]["class_loss"] < 0.8 * alone[0]["class_loss"]  # there, unlabelled images count as 0
    code, _, err = cli(
        train.main,
        *SMALL,
        "--data-path",
        colors,
        "--unlabelled-path",
        tmp_path / "more",
        "--output-dir",
        tmp_path / "x",
    )
    assert code == 2 and "--distillation-type" in err


def test_fine_tuning_at_a_higher_resolution_with_the_teacher_there(colors, teacher, tmp_path, cli):
    run(cli, colors, tmp_path / "low", "--teacher-path", teacher)
    records, out = run(
        cli, colors, tmp_path / "high", "--finetune", tmp_path / "low", "--input-size", "24", "--teacher-path", teacher,
        "--teacher-input-size", "24", "--lr", "1e-5",
    )  # fmt: skip
    assert records[0]["teacher_loss"] > 0 and "fp32, 24 pixels" in out
    saved = json.loads((tmp_path / "high" / "last" / "config.json").read_text())
    assert saved["input_size"] == 24
    low, high = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("low", "high"))
    assert low["pos_embed"].shape[1] == 18 and high["pos_embed"].shape[1] == 38


def test_a_teacher_of_more_classes(tmp_path, colors, cli):
    """An ImageNet teacher of a few of its classes, by a file: here one of seven classes, of which three are used."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7)
    save_file(model.state_dict(), tmp_path / "teacher.safetensors")
    (tmp_path / "classes.json").write_text(json.dumps({"blue": [0, 6], "green": 3, "red": 5}))
    arguments = ["--teacher-model", "test_resnet", "--teacher-path", tmp_path / "teacher.safetensors"]
    records, _ = run(
        cli, colors, tmp_path / "run", *arguments, "--teacher-classes", tmp_path / "classes.json",
        "--teacher-input-size", "16",
    )  # fmt: skip
    assert records[0]["teacher_loss"] > 0
    code, _, err = cli(
        train.main,
        *SMALL,
        "--data-path",
        colors,
        "--output-dir",
        tmp_path / "x",
        "--distillation-type",
        "hard",
        *arguments,
    )
    assert code == 2 and "7 classes" in err and "--teacher-classes" in err and not (tmp_path / "x").exists()


def test_weights_of_a_file_are_not_asked_of_the_hub_too(tmp_path, monkeypatch):
    """The recipe of `teach fit` has --pretrained on; --finetune FILE takes its place, with no word to a network."""
    import timm

    made = timm.create_model("test_resnet", num_classes=5)
    torch.save(made.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: pytest.fail("published weights"))
    given = ["--data-path", "x", "--model", "test_resnet", "--finetune", str(tmp_path / "weights.pth")]
    settings = parse_config(given, recipe="teacher")
    assert settings.model.pretrained
    model, _ = build_student(settings, 5)
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in model.state_dict().items())


def test_without_a_teacher_there_is_nothing_to_compare_with(colors, tmp_path, monkeypatch):
    monkeypatch.setattr("fastdeit.training.run.run_undistilled", lambda *_: pytest.fail("the same student again"))
    flags = ["--data-path", colors, "--output-dir", tmp_path / "run", "--epochs", 1, "--compare-undistilled"]
    summary = runs.run(*runs.RANDOM, *flags)
    assert set(summary) == {"cls", "dist", "both"}


def test_the_flags_of_docs_distillation_exist():
    page = Path(__file__).parents[2] / "docs" / "distillation.md"
    groups = [field.type for field in dataclasses.fields(Config)] + [teach.LogitCacheOptions]
    known = {f"--{field.name.replace('_', '-')}" for group in groups for field in dataclasses.fields(group)}
    named = set(re.findall(r"--[a-z][a-z-]+", page.read_text()))
    assert len(named) > 20 and named - known == {"--head", "--task-loss-weight"}  # predict's, timm's
