import os
import sys
import tempfile

import numpy as np
import pytest
from PIL import Image

from fastdeit import errors

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks for published weights should not wait for a network
# What a user's machine remembers of choices is neither read nor written; matplotlib keeps its list of fonts.
os.environ.setdefault("MPLCONFIGDIR", os.path.expanduser("~/.cache/matplotlib"))
CACHE = tempfile.TemporaryDirectory(prefix="fastdeit-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE.name


def pytest_unconfigure():
    CACHE.cleanup()  # an xdist worker ends without running what else would do it


def pytest_collection_modifyitems(config, items):
    if "soak" not in config.option.markexpr:
        for item in items:
            if "soak" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="minutes long: make soak runs these"))


COLORS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 50, 40)}


def write_folder(root, *, train=12, val=4, size=20, colors=COLORS):
    """An image folder of noisy one-coloured squares: root/{train,val}/COLOR/N.png. Easy to tell apart."""
    noise = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, color in colors.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(color) + noise.normal(0, 25, (size, size, 3)), 0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def colors(tmp_path_factory):
    pytest.importorskip("nvidia.dali")  # to read them
    return write_folder(tmp_path_factory.mktemp("colors"))


@pytest.fixture
def cli(monkeypatch, capfd):
    """Run a command in this process: cli(main, *arguments) -> (exit code, stdout, stderr)."""
    pytest.importorskip("tyro")

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            errors.run(main)
        captured = capfd.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return call


# A nano student on 16 x 16 pixels: an epoch of the colours takes well under a second.
SMALL = (
    "--recipe demo --input-size 16 --batch-size 12 --epochs 2 --warmup-epochs 0 --num-workers 1 "
    "--distillation-type none --no-compare-undistilled"
).split()


@pytest.fixture(scope="session")
def run(colors, tmp_path_factory):
    """A finished run on the colours: its folder. Not to be written to."""
    pytest.importorskip("tyro")
    from fastdeit import train
    from fastdeit.cli import parse_config
    from fastdeit.distributed.world import join

    folder = tmp_path_factory.mktemp("runs") / "colors"
    config = parse_config([*SMALL, "--data-path", str(colors), "--output-dir", str(folder), "--epochs", "3"])
    with join("cpu") as world:
        train.train(config, world)
    return folder


def refused(cli, main, *arguments, words):
    """Bad input gets one sentence that names the thing and the remedy, and exit code 2."""
    code, _, err = cli(main, *arguments)
    assert code == 2, err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in err
    for word in words:
        assert word in errors[0], errors[0]
