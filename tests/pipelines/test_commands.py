"""The commands prepare and show: their help, and one sentence with exit code 2 for what the user can put right."""

import os
import re
import subprocess
import sys

import numpy as np
import odd_images
import pytest
from PIL import Image

from fastdeit.pipelines import Augmentation, BadFiles, prepare, show
from fastdeit.pipelines import cli as pipelines_cli

COMMANDS = {"prepare": prepare, "show": show}


@pytest.fixture
def call(monkeypatch, capsys):
    """call(name, *arguments) -> (exit code, stdout, stderr)."""
    pytest.importorskip("tyro")

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        code = 0
        try:
            COMMANDS[name].main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize("name, words", [("prepare", ["DIR OUT", "--max-bad"]), ("show", ["DIR OUT.png", "--aa"])])
def test_help(call, monkeypatch, name, words):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = call(name, "--help")
    assert code == 0 and f"python -m fastdeit.pipelines.{name}" in out
    assert all(word in out for word in words)
    _, *below = out.splitlines()  # the usage is a line of its own, however long
    assert max(map(len, below)) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_folder(call, tmp_path, name):
    code, _, err = call(name, tmp_path, tmp_path / "out")
    assert code == 2 and err.startswith("error: ") and "has no split 'train': expected" in err and err.count("\n") == 1


def test_a_place_that_cannot_be_written_to(call, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = call("prepare", tiny.reader.root, tmp_path / "file" / "out")
    assert (code, err) == (2, f"error: {tmp_path / 'file' / 'out'}: Not a directory\n")


def test_too_many_bad_files(call, tmp_path):
    odd_images.write(tmp_path / "train" / "ant", {"good.jpg": odd_images.encoded(odd_images.picture()), "bad.jpg": b""})
    code, _, err = call("prepare", tmp_path, tmp_path / "out")
    assert code == 2 and "error: 1 of 2 images (50.00%) cannot be read" in err


@pytest.mark.parametrize("name", COMMANDS)
def test_without_the_extra_the_first_missing_package_is_named(tmp_path, name):
    """In a process of its own, where none of it can be imported: also importing the command needs none."""
    blocked = f"import runpy, sys; sys.modules |= dict.fromkeys({sorted(pipelines_cli.EXTRA)}); "
    line = blocked + f"runpy.run_module('fastdeit.pipelines.{name}', run_name='__main__', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", line, "x", "y"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "error: tyro is not installed: pip install 'fastdeit[train]' brings it\n",
    )


def test_a_missing_package_that_is_not_of_the_extra_is_a_defect(monkeypatch):
    pytest.importorskip("tyro")

    def absent():
        raise ModuleNotFoundError("x", name="left_pad")

    monkeypatch.setattr(sys, "argv", ["absent"])
    with pytest.raises(ModuleNotFoundError):
        pipelines_cli.run(absent, "absent", {})


def test_the_traceback_on_request(call, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDEIT_TRACEBACK", "1")
    with pytest.raises(ValueError):
        call("prepare", tmp_path, tmp_path / "out")


def test_control_c(call, tiny, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_write_split", interrupted)
    assert call("prepare", tiny.reader.root, tmp_path / "out")[::2] == (
        130, "stopped; the same command resumes\n",
    )  # fmt: skip


def test_a_killed_worker(call, tiny, tmp_path, monkeypatch):
    from fastdeit.pipelines import reencode

    monkeypatch.setattr(reencode, "write_shard", _die)
    code, _, err = call("prepare", tiny.reader.root, tmp_path / "out", "--workers", 1)
    assert code == 2 and "error: a worker was killed" in err and "--workers" in err


def _die(*_):
    os._exit(9)


def test_show_draws_what_training_sees(call, tmp_path):
    """Also with more bad images than training tolerates."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("nvidia.dali")
    images = {f"{n}.jpg": odd_images.encoded(odd_images.picture(60, 80, seed=n)) for n in range(16)}
    odd_images.write(
        tmp_path / "train/ant", images | {"bad.jpg": b"", "cut.jpg": odd_images.bad_by_body()["truncated.jpg"]}
    )
    code, _, err = call("show", tmp_path, tmp_path / "out.png", "--aa", "rand-m5")
    assert code == 0, err
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width == 8 * 136  # columns of 1.7 inches at 80 dots an inch
        assert np.asarray(picture.convert("L")).std() > 40  # not empty


def test_a_batch_is_shown_mixed_and_with_its_targets(photos):
    pytest.importorskip("nvidia.dali")
    cells = show.batch(photos, Augmentation(), 8, BadFiles.of(photos))
    assert len(cells) == 8 and all(image.shape == (224, 224, 3) for _, image in cells)
    assert all(re.fullmatch(r"[01]\.\d\d class\d \+ [01]\.\d\d class\d", title) for title, _ in cells)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--image", "100"], "--image 100: the images are numbered from 0 to 99"),
        (["--aa", "nonsense"], "RandAugment"),
        (["--split", "x"], "x"),
    ],
)
def test_show_refuses_in_a_sentence(call, tiny, tmp_path, options, words):
    code, _, err = call("show", tiny.reader.root, tmp_path / "out.png", *options)
    assert code == 2 and re.match(f"error: .*{words}", err)
