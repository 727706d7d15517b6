"""Grey images, of one channel: what of a pixel remains, what becomes of weights, and every command on such a run."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models._manipulate import adapt_input_conv

from fastdeit import evaluate, predict, report, teach, train
from fastdeit.data import as_input, grey
from fastdeit.distill.teacher import Teacher
from fastdeit.errors import UserError
from fastdeit.export.__main__ import main as export_command
from fastdeit.kernels import mix_normalize
from fastdeit.models.build import create_model, mean_std
from fastdeit.models.deit import create_model as our_model
from fastdeit.models.loading import LoadedModel, load_model
from fastdeit.models.weights import adapt_channels, load_weights

from . import runs
from .conftest import SMALL, refused

GREY = ["--in-chans", 1]
NANO = "deit_nano_distilled_patch4_16"


def test_a_grey_value_is_pillows():
    pixels = np.random.default_rng(0).integers(0, 256, (70, 60, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).convert("L"))
    assert np.array_equal(grey(torch.from_numpy(pixels)).numpy(), np.stack([expected] * 3, -1))


def test_erased_and_mixed_as_three_channels_are():
    """The grey image's first channel of what mix_normalize makes of it: noise of deviation 1, one lambda, one box."""
    images = torch.randint(0, 256, (4, 16, 20, 3), dtype=torch.uint8)
    mix = {
        "partner": torch.tensor([1, 0, 3, 2]), "lam": torch.tensor([0.3, 0.3, 0.75, 0.75]),
        "box": torch.tensor([[0] * 4] * 2 + [[2, 5, 10, 9]] * 2, dtype=torch.int32),
        "erase_box": torch.tensor([[1, 1, 12, 15]] * 4, dtype=torch.int32), "erase_seed": torch.arange(4),
    }  # fmt: skip
    ours = as_input(images, (0.4,), (0.2,), **mix)
    expected = mix_normalize(grey(images), (0.4,) * 3, (0.2,) * 3, **mix)[:, :1]
    assert ours.shape == (4, 1, 16, 20) and torch.equal(ours, expected)
    plain = as_input(images, (0.4,), (0.2,))
    torch.testing.assert_close(plain[:, 0] * 0.2 + 0.4, grey(images)[..., 0] / 255)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_weights_are_adapted_as_by_timm(channels):
    weight = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(adapt_channels(weight, channels), adapt_input_conv(channels, weight.clone()))
    one = adapt_channels(weight, 1)
    torch.testing.assert_close(adapt_channels(one, 3), one.expand(-1, 3, -1, -1) / 3)


def test_a_grey_model_sees_what_the_coloured_one_sees_of_grey_images():
    coloured, ours = our_model(NANO).eval(), our_model(NANO, in_chans=1).eval()
    state = coloured.state_dict()
    ours.load_state_dict(state | {"patch_embed.proj.weight": adapt_channels(state["patch_embed.proj.weight"], 1)})
    images = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(ours(images), coloured(images.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    assert mean_std(ours) == (pytest.approx((0.449,)), pytest.approx((0.226,)))


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224", f"fastdeit_{NANO}"])
def test_models_of_timm(name):
    import timm

    if name.startswith("fastdeit"):
        model = timm.create_model(name, in_chans=1, num_classes=3)
    else:
        model = create_model(name, in_chans=1, num_classes=3, input_size=32)
    side = 16 if name.startswith("fastdeit") else 32
    assert model.eval()(torch.randn(2, 1, side, side)).shape == (2, 3)
    mean, std = mean_std(model)
    assert len(mean) == len(std) == 1


def test_a_teacher_of_three_channels_sees_the_grey_image_in_each(run):
    """With its own normalisation: (g - m_c) / s_c, from the student's (g - m) / s."""
    loaded = load_model(run)
    teacher = Teacher(loaded, student_mean=(0.3,), student_std=(0.6,), device="cpu")
    values = torch.rand(2, 1, 16, 16)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (loaded.mean, loaded.std))
    expected = load_model(run).model.eval()((values - mean) / std)
    torch.testing.assert_close(teacher((values - 0.3) / 0.6), expected, rtol=1e-4, atol=1e-4)


def test_a_grey_teacher_and_a_coloured_student():
    ours = our_model(NANO, num_classes=3, in_chans=1)
    loaded = LoadedModel(name="grey", model=ours, input_size=16, mean=(0.5,), std=(0.5,))
    with pytest.raises(UserError, match=r"the teacher grey is for grey images.*--in-chans 1"):
        Teacher(loaded, student_mean=(0.5,) * 3, student_std=(0.5,) * 3, device="cpu")
    same = Teacher(loaded, student_mean=(0.5,), student_std=(0.5,), device="cpu")
    images = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(same(images), ours.eval()(images), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def grey_run(colors, run, tmp_path_factory):
    """A finished grey run that began with the weights of a coloured one, taught by it."""
    pytest.importorskip("nvidia.dali")
    folder = tmp_path_factory.mktemp("grey") / "run"
    teacher = ["--distillation-type", "hard", "--teacher-path", run]
    flags = [*SMALL, "--data-path", colors, *GREY, "--finetune", run, *teacher, "--epochs", 1, "--lr", 0]
    runs.run(*flags, "--min-lr", 0, "--warmup-lr", 0, "--no-model-ema", "--output-dir", folder)
    return folder


def test_a_run_begins_with_summed_weights(run, grey_run):
    began, ended = (load_file(folder / "last/model.safetensors") for folder in (run, grey_run))
    name = "patch_embed.proj.weight"
    torch.testing.assert_close(ended[name], began[name].sum(1, keepdim=True), rtol=0, atol=0)
    said = json.loads((grey_run / "last/config.json").read_text())
    assert said["in_chans"] == 1 and said["mean"] == pytest.approx([0.449]) and said["std"] == pytest.approx([0.226])


def test_every_command_takes_what_the_run_says(grey_run, colors, cli, tmp_path):
    code, out, err = cli(evaluate.main, grey_run, "--data-path", colors, "--device", "cpu")
    assert code == 0 and "12 images of 3 classes" in out, err
    image = colors / "val/red/0.png"
    code, out, err = cli(predict.main, grey_run, image, "--json", "--attention", tmp_path / "pictures")
    assert code == 0, err
    found = {entry["class"]: entry["probability"] for entry in json.loads(out)["classes"]}
    loaded = load_model(grey_run)
    assert loaded.in_chans == 1
    pixels = np.asarray(Image.open(image).resize((16, 16), Image.Resampling.BICUBIC).convert("L"))
    images = torch.from_numpy((pixels / 255 - loaded.mean[0]) / loaded.std[0]).float()[None, None]
    expected = loaded.model.eval()(images).softmax(1)[0].tolist()
    assert found == pytest.approx(dict(zip(loaded.classes, expected)), rel=0.01)  # a level or two of 255
    assert report.write(grey_run).stat().st_size > 10_000
    code, out, err = cli(train.main, "--eval", "--resume", grey_run, "--data-path", colors)
    assert code == 0 and "16 x 16" in out, err
    file = grey_run / "last/model.safetensors"
    (tmp_path / "weights.safetensors").write_bytes(file.read_bytes())
    assert load_model(tmp_path / "weights.safetensors", name=NANO, input_size=16).in_chans == 1


@pytest.mark.parametrize("kind", ["timm", "torch-export"])
def test_exported_and_read_back(grey_run, cli, tmp_path, kind):
    code, _, err = cli(export_command, grey_run, "--format", kind, "--output", tmp_path / kind)
    assert code == 0, err
    if kind == "timm":
        again, loaded = load_model(tmp_path / kind), load_model(grey_run)
        assert again.in_chans == 1 and again.mean == loaded.mean
        for name, tensor in loaded.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], tensor)
    else:
        assert "(batch, 1, height, width), grey" in (tmp_path / kind / "preprocessing.json").read_text()


def test_a_grey_start_stays_grey_and_becomes_coloured_where_it_is_asked_for(grey_run, colors, cli):
    settings = ["--data-path", colors, "--recipe", "finetune", "--finetune", grey_run, "--print-config"]
    assert json.loads(cli(train.main, *settings)[1])["data"]["in_chans"] == 1
    assert json.loads(cli(train.main, *settings, "--in-chans", 3)[1])["data"]["in_chans"] == 3
    notes = load_weights(our_model(NANO, num_classes=3), grey_run)
    assert "patch_embed.proj adapted from 1 to 3 channels of the images" in notes


def test_a_resumed_run_ends_in_the_same_bits(colors, monkeypatch, tmp_path):
    flags, whole, stopped = [*runs.RANDOM, *GREY, "--data-path", colors], tmp_path / "whole", tmp_path / "stopped"
    runs.run(*flags, "--output-dir", whole)
    runs.run_until(monkeypatch, 4, *flags, "--output-dir", stopped)
    runs.run("--resume", stopped)
    runs.assert_same(whole, stopped)


def test_a_logit_cache_has_the_losses_of_the_live_teacher(run, colors, tmp_path):
    flags = ["--in-chans", "1", "--data-path", str(colors), "--distillation-type", "hard", "--teacher-path", str(run)]
    teach.store([*runs.RANDOM, *flags, "--views", "3", "--output", str(tmp_path / "cache")])
    runs.run(*runs.RANDOM, *flags, "--output-dir", tmp_path / "live")
    flags = [*flags[:-2], "--teacher-store", str(tmp_path / "cache")]
    runs.run(*runs.RANDOM, *flags, "--output-dir", tmp_path / "cached")
    assert runs.lines(tmp_path / "live") == runs.lines(tmp_path / "cached")


def test_refusals(grey_run, colors, cli, tmp_path):
    flags = [*SMALL, "--data-path", colors, "--output-dir", tmp_path / "new"]
    refused(cli, train.main, *flags, "--in-chans", 4, words=["--in-chans 4", "red, green and blue", "1 for grey"])
    teacher = ["--distillation-type", "hard", "--teacher-path", grey_run]
    refused(cli, train.main, *flags, *teacher, words=["is for grey images", "--in-chans 1"])
    assert not (tmp_path / "new").exists()
    pytest.importorskip("transformers")
    arguments = [grey_run, "--format", "transformers", "--output", tmp_path / "out"]
    refused(cli, export_command, *arguments, words=["three channels", "--format timm or onnx"])
