"""The data and the teacher of a run without --data-path."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastdeit import demo, recipes
from fastdeit.distributed.world import World

pytest.importorskip("sklearn")
WORLD = World(torch.device("cpu"))


def test_the_digits_are_scikit_learns_in_a_stratified_split(tmp_path):
    from sklearn.datasets import load_digits

    root = demo.digits_folder(tmp_path / "digits")
    images, labels = load_digits(return_X_y=True)
    files = {split: sorted((root / split).glob("*/*.png")) for split in ("train", "val")}
    assert {split: len(found) for split, found in files.items()} == {"train": 1437, "val": 360}
    assert sorted(int(file.stem) for found in files.values() for file in found) == list(range(1797))
    for file in files["train"][::97] + files["val"][::31]:
        number = int(file.stem)
        assert file.parent.name == str(labels[number])
        pixels = np.asarray(Image.open(file), np.float64).reshape(-1)
        assert np.abs(pixels / 255 - images[number] / 16).max() <= 0.5 / 255
    for label in range(10):  # a fifth of each class
        held_out = len(list((root / "val" / str(label)).iterdir()))
        assert abs(held_out - 0.2 * (labels == label).sum()) < 1


def test_ten_images_of_each_class_keep_their_label(tmp_path):
    whole, few = demo.digits_folder(tmp_path / "whole"), demo.digits_folder(tmp_path / "few", labelled=10)
    names = {root: {str(file.relative_to(root)) for file in root.rglob("*.png")} for root in (whole, few)}
    for part in ("val/3", "val/8"):
        assert {n for n in names[few] if n.startswith(part)} == {n for n in names[whole] if n.startswith(part)}
    labelled = {name for name in names[few] if name.startswith("train")}
    assert labelled < names[whole]
    assert [sum(n.startswith(f"train/{c}/") for n in labelled) for c in range(10)] == [10] * 10
    hidden = {name.removeprefix("unlabelled/") for name in names[few] if name.startswith("unlabelled/")}
    rest = {name for name in names[whole] if name.startswith("train")} - labelled
    assert len(hidden) == 1337 and hidden == {name.split("/")[-1] for name in rest}


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """The settings of the teachers that were trained."""
    settings = []

    def run(config, world):
        config.run.output_dir.mkdir(parents=True)
        settings.append(config)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo.run, "run", run)
    return settings


def test_the_teacher_of_the_demo_is_trained_once(trained):
    config = recipes.load("demo")
    config.data.input_size = 32
    first, second = demo.with_digits(config, WORLD), demo.with_digits(config, WORLD)
    paths = first.distillation.teacher_path, second.distillation.teacher_path
    assert paths == ("runs/digits-100-teacher-test_resnet-32px",) * 2
    assert config.data.data_path is None and str(first.data.data_path) == "data/digits-100"
    assert str(first.distillation.unlabelled_path) == "data/digits-100/unlabelled"
    (settings,) = trained
    assert (settings.model.model, settings.data.input_size) == ("test_resnet", 32)
    assert settings.distillation.unlabelled_path is None  # it has no more than the labels
    assert settings.distillation.distillation_type == "none" and settings.data.data_path == first.data.data_path


@pytest.mark.parametrize("changes", [{"distillation_type": "none"}, {"teacher_path": "t"}, {"teacher_store": "t"}])
def test_no_teacher_is_trained_where_none_is_missing(trained, changes):
    config = recipes.load("demo")
    vars(config.distillation).update(changes)
    with_data = demo.with_digits(config, WORLD)
    assert trained == [] and with_data.distillation.teacher_path == config.distillation.teacher_path
    labels_alone = changes == {"distillation_type": "none"}
    assert str(with_data.data.data_path) == ("data/digits" if labels_alone else "data/digits-100")
    assert (with_data.distillation.unlabelled_path is None) == labels_alone
    config.data.data_path = "mine"
    assert demo.with_digits(config, WORLD) is config
