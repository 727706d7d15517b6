"""Re-encoding: what it does to one image, and shards that come out the same whenever it was interrupted."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import odd_images
import pytest
from PIL import Image

from fastdeit.pipelines import cli
from fastdeit.pipelines import prepare as prepare_module
from fastdeit.pipelines.bad_files import TooManyBadFiles
from fastdeit.pipelines.index.image_index import open_index
from fastdeit.pipelines.prepare import prepare
from fastdeit.pipelines.reencode import shrink


def decode(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)


# --- one image


@pytest.mark.parametrize("height, width, expected", [(60, 80, (48, 64)), (80, 60, (64, 48)), (50, 1000, (48, 960))])
def test_the_shorter_side_is_reduced(height, width, expected):
    encoded, extension = shrink(odd_images.encoded(odd_images.picture(height, width)), 48, 92)
    assert extension == "jpg" and decode(encoded).shape == (*expected, 3)


def test_it_is_pillows_bicubic_at_the_quality_asked_for():
    contents = odd_images.encoded(odd_images.picture(), quality=95)
    image = Image.open(io.BytesIO(contents)).resize((64, 48), Image.Resampling.BICUBIC)
    assert shrink(contents, 48, 92).encoded == odd_images.encoded(image, quality=92)
    assert shrink(contents, 48, 50).encoded == odd_images.encoded(image, quality=50)


def test_large_jpegs_decode_at_a_fraction_with_little_change():
    contents = odd_images.encoded(odd_images.picture(900, 1200), quality=95)
    small = Image.open(io.BytesIO(contents)).resize((80, 60), Image.Resampling.BICUBIC)
    exact = decode(odd_images.encoded(small, quality=95))
    assert np.abs(decode(shrink(contents, 60, 95).encoded) - exact).mean() < 1


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [odd_images.HEIGHT, 288])
def test_what_is_small_enough_keeps_its_bytes(format, size):
    contents = odd_images.encoded(odd_images.picture(), format)
    assert shrink(contents, size, 92).encoded == contents


@pytest.mark.parametrize("size", [30, 288])
@pytest.mark.parametrize("name", odd_images.odd_but_good())
def test_odd_images_are_those_of_pillow(name, size):
    contents = odd_images.odd_but_good()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transparency in a palette
        small = shrink(contents, size, 95)
        image = Image.open(io.BytesIO(contents))
        copied = size == 288 and (
            image.format == "WEBP" or (image.format in ("JPEG", "PNG") and image.mode in ("RGB", "L"))
        )
        expected = image.convert("RGB")  # no EXIF rotation
        if name == "deep.png":  # Pillow cuts 16 bits off at 255 where training scales them
            expected = odd_images.picture().convert("L").convert("RGB")
    if copied:
        assert small.encoded == contents
    elif size == 288 and image.format == "PNG":
        assert small.extension == "png" and np.array_equal(decode(small.encoded), np.asarray(expected))
    else:
        if size == 30:
            expected = expected.resize((40, 30), Image.Resampling.BICUBIC)
        assert small == (odd_images.encoded(expected, quality=95, comment=b""), "jpg")


@pytest.mark.parametrize("name", odd_images.bad_by_body())
@pytest.mark.parametrize("size", [288, 10_000])
def test_truncated_images_are_refused(name, size):
    with pytest.raises((OSError, ValueError)):
        shrink(odd_images.bad_by_body()[name], size, 92)


# --- a data set


def write_dataset(root: Path, count: int = 7) -> None:
    for split, classes in {"train": ["ant", "bee"], "val": ["bee", "ant"]}.items():
        for number, name in enumerate(classes):
            images = {f"{i}.x.jpg": odd_images.picture(60 + i, 80, seed=10 * number + i) for i in range(count)}
            odd_images.write(root / split / name, {k: odd_images.encoded(v) for k, v in images.items()})


def run(source: Path, out: Path, **options) -> None:
    prepare(str(source), str(out), **{"size": 48, "images_per_shard": 4, "workers": 2, "max_bad": 1} | options)


def contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    write_dataset(root)
    odd_images.write(root / "train/ant", {"empty.jpg": b"", "cut.jpg": odd_images.bad_by_body()["truncated.jpg"]})
    return root


@pytest.fixture(scope="module")
def prepared(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "out"
    run(data, out)
    return out


def test_the_shards_open_with_the_same_classes_and_labels(data, prepared):
    for split in ("train", "val"):
        source, index = open_index(data, split), open_index(prepared, split)
        good = [i for i in range(len(source)) if "cut" not in source.name(i)]
        assert index.classes == source.classes == ("ant", "bee")
        assert np.array_equal(index.labels, source.labels[good])
        assert np.minimum(index.heights, index.widths).tolist() == [48] * len(index)
        assert index.bad == ()
        for i, j in enumerate(good):
            assert index.encoded(i).tobytes() == shrink(source.encoded(j).tobytes(), 48, 92).encoded
            assert f"{j:08d}-{Path(source.name(j)).stem.replace('.', '_')}.jpg" in index.name(i)


def test_bad_files_are_named(data, prepared):
    lines = dict(line.split("\t") for line in (prepared / "bad_files.txt").read_text().splitlines())
    assert lines.pop(f"{data}/train/ant/empty.jpg") == "empty file"
    assert "truncated" in lines.pop(f"{data}/train/ant/cut.jpg") and not lines


def test_nothing_else_is_left_behind(prepared):
    shards = [f"train-{i:06d}.tar" for i in range(4)] + [f"val-{i:06d}.tar" for i in range(4)]
    assert sorted(contents(prepared)) == ["bad_files.txt", "classes.txt", "prepare.json", *shards]


class Killed(BaseException):
    """Stands in for SIGKILL: nothing in the code under test catches it."""


@pytest.mark.parametrize("instant", [0, 1, 2, 5, 8])
def test_interrupted_before_any_rename_it_resumes_to_the_same_bytes(data, prepared, tmp_path, monkeypatch, instant):
    replaced = []

    def replace_or_die(source, target):
        if len(replaced) == instant:
            raise Killed
        replaced.append(target)
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.os, "replace", replace_or_die)
        with pytest.raises(Killed):
            run(data, tmp_path / "out")
    run(data, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(prepared)


def test_finished_shards_are_not_written_again(data, prepared):
    before = {file.name: file.stat().st_mtime_ns for file in prepared.glob("*.tar")}
    removed = prepared / "train-000001.tar"
    whole = removed.read_bytes()
    removed.unlink()
    run(data, prepared, workers=1)
    assert removed.read_bytes() == whole
    after = {file.name: file.stat().st_mtime_ns for file in prepared.glob("*.tar")}
    assert {name for name in after if after[name] != before[name]} == {"train-000001.tar"}


def children(pid: int) -> list[int]:
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def descendants(pid: int) -> list[int]:
    return [grandchild for child in children(pid) for grandchild in (child, *descendants(child))]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_killed_it_leaves_no_process_and_resumes(tmp_path):
    pytest.importorskip("tyro")
    source, out = tmp_path / "source", tmp_path / "out"
    images = {f"{i}.jpg": odd_images.encoded(odd_images.picture(900, 1200, seed=i)) for i in range(60)}
    odd_images.write(source / "train/ant", images)
    options = ["--images-per-shard", "2", "--size", "100", "--workers", "2"]
    line = [sys.executable, "-m", "fastdeit.pipelines.prepare", str(source), str(out), *options]
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(list(out.glob("*.tar"))) >= 2)
    processes = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(processes) >= 3  # the fork server and two workers
    wait_until(lambda: not any(map(is_alive, processes)), 20)
    finished = contents(out)
    assert 2 <= len(list(out.glob("train*.tar"))) < 30

    run(source, out, images_per_shard=2, size=100)
    run(source, tmp_path / "undisturbed", images_per_shard=2, size=100)
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert all(contents(out)[name] == data for name, data in finished.items() if not name.startswith("."))


def test_too_many_bad_files_stop_it(data, tmp_path):
    with pytest.raises(TooManyBadFiles, match=r"2 of 16 images \(12\.50%\).*--max-bad"):
        run(data, tmp_path / "out", max_bad=0.1)


def test_other_settings_or_images_are_refused(data, prepared, tmp_path):
    with pytest.raises(ValueError, match=r"begun with other images or settings \(size\)"):
        run(data, prepared, size=49)
    write_dataset(tmp_path / "other", 3)
    with pytest.raises(ValueError, match=r"other images or settings \(train, val\)"):
        run(tmp_path / "other", prepared)
    with pytest.raises(ValueError, match="is not empty and was not made by this command"):
        run(data, data)
    with pytest.raises(ValueError, match="there is no folder"):
        run(tmp_path / "nowhere", tmp_path / "out")
    for options in ({"size": 0}, {"quality": 100}, {"workers": 0}, {"images_per_shard": 0}, {"max_bad": 2}):
        with pytest.raises(ValueError, match="--" + next(iter(options)).replace("_", "-")):
            run(data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_shards_can_be_prepared_again(prepared, tmp_path):
    run(prepared, tmp_path / "smaller", size=24)
    first, second = open_index(prepared), open_index(tmp_path / "smaller")
    assert second.classes == first.classes and np.array_equal(second.labels, first.labels)
    assert set(np.minimum(second.heights, second.widths)) == {24}
    assert json.loads((tmp_path / "smaller/prepare.json").read_text())["size"] == 24


def test_progress_without_a_terminal(monkeypatch):
    monkeypatch.setattr(cli, "SECONDS_BETWEEN_LINES", 0.0)
    now = iter([0.0, 10.0, 10.0, 40.0, 40.0])
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(now))
    stream = io.StringIO()
    with cli.show_progress("images", 1000, finished=100, stream=stream) as shown:
        shown(300)
    lines = ["images 300 of 1,000 (30.0%), 20/s, 35 s left", "images 1,000 of 1,000 (100.0%), 22/s"]
    assert stream.getvalue().splitlines() == lines
