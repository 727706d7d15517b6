"""What a run makes of its data set: the order of its classes, which images validate, and what is refused or said."""

import types

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali")

from fastdeit import evaluate, train
from fastdeit.cli import parse_config
from fastdeit.config import Config
from fastdeit.data import compiles, labelled_alone, loaders, open_images, order_of_numbers, remarks, trusted_decoding
from fastdeit.distributed.world import World, join
from fastdeit.evaluation import plots
from fastdeit.pipelines import SyntheticIndex, eval_loader
from fastdeit.pipelines.decode import probe
from fastdeit.training.run import undistilled

from .conftest import COLORS, refused, write_folder

FLAGS = ["--recipe", "demo", "--device", "cpu", "--dry-run"]


@pytest.mark.parametrize(
    ("device", "compiler", "expected"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_a_gpu_compiles_unless_told_otherwise(monkeypatch, device, compiler, expected):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/clang" if compiler and name == "clang" else None)
    config, device = Config(), torch.device(device)
    assert compiles(config, device) == expected
    for said in (True, False):
        config.speed.compile = said
        assert compiles(config, device) == said


def opened(path, *flags):
    config = parse_config([*FLAGS, "--data-path", str(path), *map(str, flags)])
    with join("cpu") as world:
        return config, open_images(config, world)


def test_without_a_teacher_the_images_with_labels_come_more_often(colors, tmp_path):
    more = write_folder(tmp_path / "more", train=8, val=0)
    flags = ("--distillation-type", "hard", "--teacher-path", "t", "--unlabelled-path", more)
    config, (training, validation) = opened(colors, *flags)
    alone, same = labelled_alone((training, validation))
    assert len(training) == len(alone) == 36 + 24 and same is validation
    assert np.bincount(alone.labels).tolist() == [20, 20, 20]
    assert {alone.path(i) for i in range(60)} == {training.path(i) for i in range(36)}
    assert labelled_alone((training.parts[0], validation))[0] is training.parts[0]
    settings = undistilled(config)
    assert (settings.distillation.distillation_type, settings.distillation.unlabelled_path) == ("none", None)


@pytest.fixture
def numbers(tmp_path):
    """Eleven classes, 0 to 10."""
    return write_folder(tmp_path / "numbers", train=1, val=1, colors={str(i): (20 * i, 0, 0) for i in range(11)})


def test_one_class_is_refused_with_the_folders_in_it(cli, tmp_path):
    write_folder(tmp_path / "all" / "train", train=1, val=0)
    (tmp_path / "all/train/val").rename(tmp_path / "all/val")
    refused(
        cli, train.main, *FLAGS, "--data-path", tmp_path / "all",
        words=["one class only, train (which holds the folders blue, green, red)", "one level too high?"],
    )  # fmt: skip
    write_folder(tmp_path / "one", train=1, val=1, colors={"red": COLORS["red"]})
    refused(cli, train.main, *FLAGS, "--data-path", tmp_path / "one", words=["one class only, red: give at least two"])


def test_the_order_of_the_classes(numbers):
    as_strings = ("0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9")
    _, (training, validation) = opened(numbers)
    assert training.classes == validation.classes == as_strings
    order = numbers / "order.txt"
    order.write_text("".join(f"{i}\n" for i in range(11)))
    _, (training, validation) = opened(numbers, "--classes", order)
    assert training.classes == validation.classes == tuple(map(str, range(11)))
    for index in (training, validation):
        folders = [index.name(i).split("/")[-2] for i in range(11)]
        assert index.labels.tolist() == list(map(int, folders))
    order.write_text("0\n1\n")
    with pytest.raises(ValueError, match="it has 10, 2, 3, 4, 5 and 4 more"):
        opened(numbers, "--classes", order)


def test_numbers_sorted_as_strings_are_said_of_weights_of_timm(numbers):
    config, indices = opened(numbers)
    assert remarks(config, indices) == []
    config.model.pretrained = True
    (said,) = remarks(config, indices)
    assert said.startswith("the classes are sorted as strings (0, 1, 10, 2, ...)") and "--classes FILE" in said
    config.data.classes = "order.txt"
    assert remarks(config, indices) == []
    assert order_of_numbers(["1", "2", "9"]) is order_of_numbers(["n01", "n10", "n9a"][:2]) is None
    assert order_of_numbers(["class10", "class2"]) is not None
    assert order_of_numbers(["2", "10", "1"]) is None  # an order of one's own


def test_images_of_test_that_validate_are_said(colors, tmp_path):
    config, indices = opened(colors)
    assert remarks(config, indices) == []
    (tmp_path / "train").symlink_to(colors / "train")
    (tmp_path / "test").symlink_to(colors / "val")
    (said,) = remarks(*opened(tmp_path))
    assert "has no val: the test images are the validation images, and the checkpoint best is chosen on them" in said


def test_an_order_for_weights_that_have_one(cli, run, colors, tmp_path):
    """The same is let pass, another one is refused."""
    (tmp_path / "order.txt").write_text("red\ngreen\nblue\n")
    refused(
        cli, evaluate.main, run, "--data-path", colors, "--classes", tmp_path / "order.txt",
        words=["order.txt", "names its classes", "omit the flag"],
    )  # fmt: skip


def test_class_names_that_are_formulas_to_matplotlib(tmp_path):
    batch = types.SimpleNamespace(labels=torch.tensor([0, 1, -100]), mix=None)

    class Loader(list):
        def set_epoch(self, epoch):
            pass

    half = (0.5,) * 3
    path = tmp_path / "first_batch.png"
    plots.first_batch(Loader([batch]), lambda batch: torch.zeros(3, 3, 8, 8), half, half, ("$a_{$", "$x^{$"), path)
    with Image.open(tmp_path / "first_batch.png") as drawn:
        assert np.asarray(drawn).std() > 0


class SecondGpu(World):
    """Of two processes; the other one's word is what `broadcast` brings."""

    def broadcast(self, value):
        return value if self.is_main else probe.Choice("cpu", "of rank 0")


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_probes_the_decoder_of_its_gpu_and_all_take_its_word(colors, monkeypatch, capsys, rank):
    probed, built = [], []
    monkeypatch.setattr(
        probe, "trusted", lambda *arguments: probed.append(arguments) or probe.Choice("whole", "a sentence")
    )
    monkeypatch.setattr("fastdeit.pipelines.decode.gpu.GpuDecoder", lambda *arguments: built.append(arguments[-1]))
    config, indices = opened(colors, "--num-workers", 3, "--batch-size", 12)
    world = SecondGpu(torch.device("cuda", 1), rank, 2)
    loaders(config, indices, world, None)
    assert built == (["whole"] * 2 if rank == 0 else ["cpu"] * 2)
    assert [(index.fingerprint, *rest) for index, *rest in probed] == (
        [(indices[0].fingerprint, 1, 3)] if rank == 0 else []
    )
    assert capsys.readouterr().err.count("a sentence") == (rank == 0)


def test_a_loader_by_itself_probes_its_own_images(colors, monkeypatch, caplog):
    built = []
    monkeypatch.setattr(probe, "trusted", lambda index, device, threads: probe.Choice("whole", f"cuda:{device}"))
    monkeypatch.setattr("fastdeit.pipelines.decode.gpu.GpuDecoder", lambda *arguments: built.append(arguments[-1]))
    index = opened(colors)[1][0]
    eval_loader(index, device="cuda:3")
    eval_loader(index, device="cuda:3", decoding="regions")
    assert built == ["whole", "regions"] and caplog.messages == ["cuda:3"]


def test_nothing_is_probed_without_a_gpu_or_files(colors, monkeypatch):
    monkeypatch.setattr(probe, "trusted", lambda *_: pytest.fail("was probed"))
    index = opened(colors)[1][0]
    assert trusted_decoding(index, World(torch.device("cpu"))) is None
    assert trusted_decoding(SyntheticIndex(8), World(torch.device("cuda", 0))) is None
