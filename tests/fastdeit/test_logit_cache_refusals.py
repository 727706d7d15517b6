"""Logit caches that are refused: of another recipe, other data, another version, damaged, or in the way."""

import os

import numpy as np
import pytest

from fastdeit import teach
from fastdeit.cli import parse_config
from fastdeit.distill import cache_writer, logit_cache
from fastdeit.distill.logit_cache import LogitCache
from fastdeit.distributed.world import join
from fastdeit.errors import UserError

from . import logit_caches
from .conftest import write_folder
from .logit_caches import changed, loader_with_targets, same, without

pytest.importorskip("tyro")
pytest.importorskip("nvidia.dali")

data_fixture, teacher_fixture = logit_caches.data_fixture, logit_caches.teacher_fixture
flags_fixture, cache_fixture = logit_caches.flags_fixture, logit_caches.cache_fixture


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--seed", "1"], "recipe seed is 0 in the logit cache and 1 here"),
        (["--hflip", "0.4"], "recipe hflip is 0.5 in the logit cache and 0.4 here"),
        (["--input-size", "20"], "recipe input_size"),
        (["--batch-size", "4"], "recipe global_batch is 8 in the logit cache and 4 here"),
        (["--aa", "3aug"], "recipe aa"),
        (["--class-balance", "1"], "recipe class_balance is .* in the logit cache and 1.0 here"),
        (["--precision", "bf16"], 'precision is "float32" in the logit cache and "bfloat16" here'),
    ],
)
def test_another_recipe(flags, cache, change, words):
    with pytest.raises(UserError, match=words):
        loader_with_targets(parse_config([*flags, *change]), cache)


def test_other_data(flags, cache, tmp_path):
    data = write_folder(tmp_path / "data", train=15, val=4)
    with pytest.raises(UserError, match="data fingerprint"):
        loader_with_targets(parse_config([*flags, "--data-path", str(data)]), cache)


def test_another_version_of_what_makes_the_pixels(flags, cache, tmp_path):
    folder = changed(cache, tmp_path, lambda header: header["pixels"].update({"nvidia-dali": "1.0"}))
    with pytest.raises(UserError, match=r'nvidia-dali is "1\.0" in the logit cache and "2'):
        loader_with_targets(parse_config(flags), folder)


def test_other_pixels_though_all_versions_agree(flags, cache, tmp_path):
    folder = changed(cache, tmp_path, lambda header: None)
    probe = np.load(folder / "probe.npy")
    probe[0, 0, 0, 0] += 1e-3
    np.save(folder / "probe.npy", probe)
    with pytest.raises(UserError, match="other pixels"):
        loader_with_targets(parse_config(flags), folder)


def test_an_image_that_could_be_read_then_and_not_now(flags, cache, tmp_path, data):
    folder = changed(cache, tmp_path, lambda header: None)
    indices = np.load(folder / "indices.npy", mmap_mode="r+")
    indices[0, 9] = (indices[0, 9] + 1) % 48
    indices.flush()
    loader = loader_with_targets(parse_config(flags), folder)
    loader.set_epoch(0)
    with pytest.raises(UserError, match=r"has the target of .*png where this run draws .*png"):
        list(loader)


def test_another_format(cache, tmp_path):
    folder = changed(cache, tmp_path, lambda header: header.update(format=0))
    with pytest.raises(UserError, match="format 0"):
        LogitCache(folder)


def test_a_folder_that_is_no_cache(tmp_path):
    with pytest.raises(UserError, match="is not a logit cache"):
        LogitCache(tmp_path)


def test_a_cache_started_with_other_settings_is_untouched(flags, cache, tmp_path):
    before = {path: path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}
    with pytest.raises(UserError, match="started with other settings: recipe seed is 0 in the logit cache and 5 here"):
        teach.store([*flags, "--seed", "5", "--views", "4", "--output", str(cache)])
    assert {path: path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()} == before


def test_a_refused_teacher_leaves_no_cache(flags, tmp_path, monkeypatch):
    """The corrected command (--teacher-precision, say) is not refused for a cache started before."""
    arguments = [*flags, "--views", "1", "--output", str(tmp_path / "cache")]
    with monkeypatch.context() as patch:
        patch.setattr("fastdeit.distill.teacher.Teacher.check", refuse)
        with pytest.raises(UserError, match="overflows"):
            teach.store(arguments)
    teach.store([*arguments, "--teacher-precision", "bf16"])
    assert LogitCache(tmp_path / "cache").header["teacher"]["precision"] == "bfloat16"


def refuse(*_):
    raise UserError("the teacher overflows")


def test_other_files_are_untouched(flags, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="contains other files"):
        teach.store([*flags, "--views", "2", "--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--views", "2"], "--output"),
        (["--views", "0", "--output", "x"], "--views 0"),
        (["--views", "1", "--output", "x", "--distillation-type", "none"], "hard or soft"),
        (["--views", "1", "--output", "x", "--teacher-store", "y"], "omit --teacher-store"),
    ],
)
def test_flags_that_cannot_be_meant(flags, arguments, words):
    with pytest.raises(UserError, match=words):
        teach.store([*without(flags, "--teacher-path"), *arguments])


def test_a_full_disk_says_so_and_loses_nothing(cache, tmp_path, monkeypatch):
    folder = changed(cache, tmp_path, lambda header: None)
    header = logit_cache.read_header(folder)
    rows = {"indices": np.zeros((6, 8)), "labels": np.zeros((6, 8))}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left"), join("cpu") as world:
        cache_writer._write(folder, header, [((0, 0, 6), rows)], 1, world)
    same(folder, cache)
