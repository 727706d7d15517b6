"""--val-share: one folder of classes, or data without val, a share of each class held out for validation."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("nvidia.dali")

from fastdeit import evaluate, train
from fastdeit.cli import parse_config
from fastdeit.data import open_images, open_validation, remarks
from fastdeit.distributed.world import join
from fastdeit.errors import UserError
from fastdeit.pipelines import open_classes
from fastdeit.pipelines.held_out import chosen
from fastdeit.report import pictures

from .conftest import SMALL, refused, write_folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """One folder of classes: 12 images each of blue, green, red."""
    root = write_folder(tmp_path_factory.mktemp("one"), train=12, val=0)
    shutil.rmtree(root / "val", ignore_errors=True)
    return root / "train"


def opened(path, *flags):
    config = parse_config(["--recipe", "demo", "--dry-run", "--data-path", str(path), *map(str, flags)])
    with join("cpu") as world:
        return config, *open_images(config, world)


def names(index):
    return {index.records.names[i] for i in range(len(index))}


def test_a_share_of_each_class_by_seed():
    labels = np.repeat([0, 1, 2, 3, 4, -100], [100, 11, 3, 2, 1, 5])
    random = np.random.default_rng(0).permutation(len(labels))
    held = chosen(labels[random], 0.1, seed=3)
    counts = [int(held[labels[random] == label].sum()) for label in (0, 1, 2, 3, 4, -100)]
    assert counts == [10, 1, 1, 1, 0, 0]
    assert np.array_equal(held, chosen(labels[random], 0.1, seed=3))
    assert not np.array_equal(held, chosen(labels[random], 0.1, seed=4))
    counts = [int(chosen(labels, 0.95, 0)[labels == label].sum()) for label in (0, 1, 2, 3, 4)]
    assert counts == [95, 10, 2, 1, 0]  # one is left to train on


def test_every_image_is_held_out_as_often_as_any_other():
    held = np.stack([chosen(np.zeros(20, np.int64), 0.25, seed) for seed in range(2000)])
    assert (held.sum(1) == 5).all()
    assert np.abs(held.mean(0) - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 2000)


def test_the_choice_is_for_good():
    """A run that is resumed later, by other versions, must find the same."""
    assert np.flatnonzero(chosen(np.repeat([0, 1], 12), 0.25, seed=7)).tolist() == [4, 6, 11, 14, 16, 17]


def test_a_folder_of_classes_and_a_train_without_val_are_split_alike(classes):
    config, training, validation = opened(classes, "--val-share", 0.25, "--seed", 5)
    assert (len(training), len(validation)) == (27, 9) and training.classes == validation.classes
    assert np.bincount(validation.labels).tolist() == [3, 3, 3]
    everything = names(open_classes(classes))
    assert names(training) | names(validation) == everything and not names(training) & names(validation)
    assert all(name.split("/")[0] in training.classes for name in everything)
    _, _, of_train = opened(classes.parent, "--val-share", 0.25, "--seed", 5)
    assert names(of_train) == {f"train/{name}" for name in names(validation)}
    assert names(opened(classes, "--val-share", 0.25, "--seed", 6)[2]) != names(validation)
    (said,) = [line for line in remarks(config, (training, validation)) if "--val-share" in line]
    assert "9 images are held out" in said and "one image" not in said


def test_a_run_writes_what_it_held_out_resumes_and_is_evaluated_on_it(classes, tmp_path, cli, monkeypatch):
    target = tmp_path / "run"
    flags = [*SMALL, "--data-path", classes, "--val-share", 0.25, "--output-dir", target, "--batch-size", 6]
    code, out, err = cli(train.main, *flags)
    assert code == 0 and "9 validation images" in out, err
    listed = (target / "validation.txt").read_text().splitlines()
    index = open_validation(classes, classes=None, settings=json.loads((target / "settings.json").read_text()))
    assert listed == [index.name(i) for i in range(9)]
    code, out, err = cli(evaluate.main, target, "--data-path", classes, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["data"]["images"] == 9
    summary = json.loads((target / "summary.json").read_text())
    assert result["model"]["both"]["top1"] == pytest.approx(summary["both"], abs=1e-6)
    assert pictures.look(target, json.loads((target / "settings.json").read_text())).images == 9
    (target / "summary.json").unlink()
    code, out, err = cli(train.main, "--resume", target)
    assert code == 0 and "9 validation images" in out, err
    refused(cli, train.main, "--resume", target, "--val-share", 0.5, words=["--val-share 0.5", "started with 0.25"])
    (classes / "blue" / "0.png").rename(tmp_path / "0.png")
    (target / "summary.json").unlink()
    try:
        refused(cli, train.main, "--resume", target, words=["not those the run was started with"])
    finally:
        (tmp_path / "0.png").rename(classes / "blue" / "0.png")


def test_what_has_a_val_of_its_own_is_refused_but_test_is_left_for_the_end(colors, tmp_path):
    with pytest.raises(UserError, match=r"validation images of its own \(val\)"):
        opened(colors, "--val-share", 0.1)
    root = write_folder(tmp_path / "data", train=4, val=2)
    (root / "val").rename(root / "test")
    _, training, validation = opened(root, "--val-share", 0.25)
    assert (len(training), len(validation), validation.split) == (9, 3, "val")
    settings = {"data": {"val_share": 0.25}, "run": {"seed": 0}}
    assert len(open_validation(root, classes=None, settings=settings)) == 6  # evaluated on what no training saw


@pytest.mark.parametrize("level, words", [("", "has no val"), ("train", "neither train nor val")])
def test_without_val_the_flag_is_named(classes, level, words):
    with pytest.raises(UserError, match=rf"{words}: --val-share 0\.1"):
        opened(classes.parent / level)
