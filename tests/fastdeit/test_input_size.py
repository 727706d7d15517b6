"""Images that are no squares, through every command: trained, resumed, evaluated, predicted, exported, taught."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastdeit import evaluate, predict, report, teach, train
from fastdeit.batch import kept_bytes
from fastdeit.config import Config
from fastdeit.export.__main__ import main as export_command
from fastdeit.models.build import create_model
from fastdeit.models.deit import create_model as our_model
from fastdeit.models.loading import load_model
from fastdeit.models.weights import interpolate_position_embedding

from . import runs
from .conftest import SMALL, refused

pytest.importorskip("nvidia.dali")
WIDE = ["--input-size", 12, 20]  # three rows of five patches of 4 pixels
NANO = "deit_nano_distilled_patch4_16"


@pytest.fixture(scope="module")
def wide(colors, run, tmp_path_factory):
    """A finished run at 12 x 20 pixels that began with the weights of one at 16, taught by that one at 24 x 8."""
    folder = tmp_path_factory.mktemp("wide") / "run"
    teacher = ["--distillation-type", "hard", "--teacher-path", run, "--teacher-input-size", 24, 8]
    flags = [*SMALL, "--data-path", colors, *WIDE, "--finetune", run, *teacher, "--epochs", 1, "--lr", 0]
    runs.run(*flags, "--min-lr", 0, "--warmup-lr", 0, "--no-model-ema", "--output-dir", folder)
    return folder


def test_the_position_embedding_is_that_of_the_grid(run, wide):
    began, ended = (load_file(folder / "last/model.safetensors") for folder in (run, wide))
    expected = interpolate_position_embedding(began["pos_embed"], (3, 5), prefix_tokens=2, old_grid=(4, 4))
    torch.testing.assert_close(ended["pos_embed"], expected, rtol=0, atol=0)
    assert ended["pos_embed"].shape == (1, 2 + 15, 128)
    said = json.loads((wide / "last/config.json").read_text())
    assert said["input_size"] == [12, 20] and Config.from_dict(said["settings"]).data.input_size == (12, 20)
    assert load_model(wide).input_size == (12, 20) and load_model(run).input_size == 16


def test_every_command_takes_what_the_run_says(wide, colors, cli, tmp_path):
    code, out, err = cli(evaluate.main, wide, "--data-path", colors, "--device", "cpu")
    assert code == 0 and "at 12 x 20 pixels" in out, err
    code, out, err = cli(evaluate.main, wide, "--data-path", colors, "--input-size", 16, 8)
    assert code == 0 and "at 16 x 8 pixels" in out and "from 15 patches to 4 x 2" in out, err
    image = colors / "val/red/0.png"
    code, out, err = cli(predict.main, wide, image, "--json", "--attention", tmp_path / "pictures")
    assert code == 0, err
    found = {entry["class"]: entry["probability"] for entry in json.loads(out)["classes"]}
    assert Image.open(tmp_path / "pictures/0.png").width > 400

    loaded = load_model(wide)  # the same by Pillow: cover 12 x 20 (crop_pct 1), cut the centre
    pixels = np.asarray(Image.open(image).resize((20, 20), Image.Resampling.BICUBIC).crop((0, 4, 20, 16)))
    mean, std = (np.array(value, np.float32) for value in (loaded.mean, loaded.std))
    images = torch.from_numpy(((pixels / 255 - mean) / std).astype(np.float32)).permute(2, 0, 1)[None]
    expected = loaded.model.eval()(images).softmax(1)[0].tolist()
    assert found == pytest.approx(dict(zip(loaded.classes, expected)), rel=1e-4)
    report.write(wide)
    assert (wide / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("kind", ["timm", "torch-export"])
def test_exported_and_read_back(wide, cli, tmp_path, kind):
    code, _, err = cli(export_command, wide, "--format", kind, "--output", tmp_path / kind)
    assert code == 0, err
    if kind == "timm":
        again, loaded = load_model(tmp_path / kind), load_model(wide)
        assert again.input_size == (12, 20) and again.crop_pct == loaded.crop_pct
        for name, tensor in loaded.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], tensor)
    else:
        assert json.loads((tmp_path / kind / "preprocessing.json").read_text())["input_size"] == [12, 20]


def test_a_resumed_run_ends_in_the_same_bits(colors, monkeypatch, tmp_path):
    """With everything that depends on the sides: crops, erasing, cutmix, geometric operations."""
    flags, whole, stopped = [*runs.RANDOM, *WIDE, "--data-path", colors], tmp_path / "whole", tmp_path / "stopped"
    runs.run(*flags, "--output-dir", whole)
    runs.run_until(monkeypatch, 4, *flags, "--output-dir", stopped)
    runs.run("--resume", stopped)
    runs.assert_same(whole, stopped)


def test_a_logit_cache_has_the_losses_of_the_live_teacher(run, colors, tmp_path):
    teaching = ["--distillation-type", "hard", "--teacher-path", str(run)]
    flags = [*map(str, WIDE), "--data-path", str(colors), *teaching]
    teach.store([*runs.RANDOM[:-2], "--hflip", "0.5", *flags, "--views", "3", "--output", str(tmp_path / "cache")])
    header = json.loads((tmp_path / "cache/header.json").read_text())
    assert header["recipe"]["input_size"] == [12, 20]
    live, cached = tmp_path / "live", tmp_path / "cached"
    runs.run(*runs.RANDOM, *flags, "--output-dir", live)
    flags = [*flags[:-2], "--teacher-store", str(tmp_path / "cache")]
    runs.run(*runs.RANDOM, *flags, "--output-dir", cached)
    for one, other in zip(runs.lines(live), runs.lines(cached), strict=True):
        assert one == other


def test_the_estimate_of_memory_counts_pixels():
    """A DeiT keeps as much of 8 x 32 pixels as of 16 x 16: 16 tokens and the prefix."""
    model = our_model(NANO, img_size=(8, 32))
    assert kept_bytes(model, (3, 8, 32), torch.float32) == kept_bytes(our_model(NANO), 16, torch.float32)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_resnet"])
def test_models_of_timm(name):
    model = create_model(name, num_classes=3, input_size=(32, 80)).eval()
    assert model(torch.randn(2, 3, 32, 80)).shape == (2, 3)


def test_the_tokens_are_row_by_row():
    """A patch's token lies where its position does: the features of a picture turned with its positions are equal."""
    torch.manual_seed(0)
    wide, tall = our_model(NANO, img_size=(8, 20)).eval(), our_model(NANO, img_size=(20, 8)).eval()
    turned = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    grid = turned["pos_embed"][:, 2:].unflatten(1, (2, 5)).transpose(1, 2).flatten(1, 2)
    turned["pos_embed"] = torch.cat([turned["pos_embed"][:, :2], grid], 1)
    turned["patch_embed.proj.weight"] = turned["patch_embed.proj.weight"].transpose(2, 3)
    tall.load_state_dict(turned)
    images = torch.randn(2, 3, 8, 20)
    torch.testing.assert_close(tall(images.transpose(2, 3)), wide(images), rtol=1e-4, atol=1e-5)


def test_refusals(run, wide, colors, cli, tmp_path):
    new = ["--output-dir", tmp_path / "new"]
    flags = [*SMALL, "--data-path", colors, *new]
    refused(cli, train.main, *flags, "--input-size", 12, 18, words=["12 x 18", "multiples of 4"])
    vit = [*flags, "--model", "vit_tiny_patch16_224", "--no-model-ema"]
    refused(cli, train.main, *vit, "--input-size", 40, 64, words=["40 x 64", "16", "--input-size 32 64 or 48 64"])
    refused(cli, train.main, *flags, "--input-size", 12, 0, words=["--input-size 12 0", "at least 1"])
    maps = ["--distillation-type", "soft", "--teacher-path", run, "--attention-distillation-weight", 1]
    refused(cli, train.main, *flags, *WIDE, *maps, words=["3 x 5 patches", "--teacher-input-size 12 20"])
    pytest.importorskip("transformers")
    arguments = [wide, "--format", "transformers", "--output", tmp_path / "out"]
    refused(cli, export_command, *arguments, words=["12 x 20", "--format timm or onnx"])
