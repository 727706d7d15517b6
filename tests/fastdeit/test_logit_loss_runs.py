"""Runs with DKD, DIST, NKD and standardised logits: live, from a logit cache, with unlabelled images, and refused."""

import math

import pytest

from fastdeit import teach, train
from fastdeit.distill import logit_cache

from . import logit_caches, runs
from .conftest import COLORS, refused, write_folder
from .logit_caches import cached, without

pytest.importorskip("tyro")
pytest.importorskip("nvidia.dali")

data_fixture, teacher_fixture = logit_caches.data_fixture, logit_caches.teacher_fixture


@pytest.fixture(name="flags", scope="module")
def flags_fixture(data, teacher):
    return [
        *without(logit_caches.RECIPE, "--distillation-type"),
        "--data-path",
        str(data),
        "--teacher-path",
        str(teacher),
    ]


@pytest.fixture(name="caches", scope="module")
def caches_fixture(flags, tmp_path_factory):
    """{classes kept: one epoch of them}"""
    folder = tmp_path_factory.mktemp("caches")
    for top in ("2", "3"):
        teach.store([*flags, "--distillation-type", "dkd", "--views", "1", "--top", top, "--output", str(folder / top)])
    return {2: folder / "2", 3: folder / "3"}


@pytest.mark.parametrize("kind", ["dkd", "dist", "nkd", "soft --logit-standardization", "dkd --logit-standardization"])
def test_one_cache_serves_them_all(flags, caches, tmp_path, kind):
    assert logit_cache.read_header(caches[3])["kind"] == "soft"
    flags = [*flags, "--epochs", "1", "--distillation-type", *kind.split()]
    runs.run(*flags, "--output-dir", tmp_path / "live")
    runs.run(*cached(flags, caches[3]), "--output-dir", tmp_path / "cached")
    for live, stored in zip(*(runs.lines(tmp_path / name) for name in ("live", "cached")), strict=True):
        if live["kind"] == "train":
            assert live["teacher_loss"] > 0
            assert [live[key] for key in runs.LOSSES] == pytest.approx([stored[key] for key in runs.LOSSES], rel=5e-3)


def test_a_cache_of_some_classes(flags, caches, tmp_path, cli):
    flags = cached(
        [*flags, "--epochs", "1", "--output-dir", str(tmp_path / "run"), "--distillation-type", "dkd"], caches[2]
    )
    refused(cli, train.main, *flags, "--logit-standardization", words=["all 3 classes", "keeps 2", "--top 3"])
    runs.run(*flags)
    assert all(math.isfinite(line["loss"]) for line in runs.lines(tmp_path / "run") if line["kind"] == "train")


@pytest.mark.parametrize("kind", ["dkd", "nkd", "dist"])
def test_images_without_labels(flags, tmp_path, kind):
    write_folder(tmp_path / "more", train=4, val=1, colors=COLORS)
    flags = [*flags, "--epochs", "1", "--distillation-type", kind, "--unlabelled-path", str(tmp_path / "more")]
    runs.run(*flags, "--output-dir", tmp_path / "run")
    (line,) = [line for line in runs.lines(tmp_path / "run") if line["kind"] == "train"]
    assert math.isfinite(line["loss"]) and line["teacher_loss"] > 0
