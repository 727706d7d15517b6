"""fastdeit.train and fastdeit.load, as a person types them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastdeit
from fastdeit import api, predict
from fastdeit.cli import parse_config
from fastdeit.errors import UserError
from fastdeit.models import inference
from fastdeit.pipelines.decode.in_memory import as_pixels, evaluation_view
from fastdeit.training import notebook

# ---------------------------------------------------------------------------------------------------------------------
# Training

SETTINGS = {
    "recipe": "demo", "input_size": 16, "batch_size": 12, "epochs": 2, "warmup_epochs": 0, "num_workers": 1,
    "distillation_type": "none", "compare_undistilled": False, "device": "cpu", "tracker": "none",
}  # fmt: skip


def test_a_run_from_python_is_the_run_of_the_command(colors, tmp_path, monkeypatch):
    """The same settings, weights and figures as by the command line; the folder is found without being named."""
    from . import runs

    monkeypatch.chdir(tmp_path)
    run = fastdeit.train(colors, **SETTINGS)
    assert run.folder.parent == Path("runs") and run.folder.name.startswith("demo-")
    assert json.loads((run.folder / "summary.json").read_text()) == run.metrics and set(run.metrics) == {
        "cls", "dist", "both",
    }  # fmt: skip
    assert [line["epoch"] for line in run.history] == [0, 1] and run.history[-1]["model"] == run.metrics
    assert run.model.classes == ("blue", "green", "red") and run.model.name == str(run.folder)
    line = "--recipe demo --input-size 16 --batch-size 12 --epochs 2 --warmup-epochs 0 --num-workers 1 "
    line += "--distillation-type none --no-compare-undistilled --device cpu --tracker none"
    runs.run(*line.split(), "--data-path", colors, "--output-dir", tmp_path / "command")
    runs.assert_same(run.folder, tmp_path / "command")
    again = fastdeit.train(resume=str(run.folder))
    assert again.folder == run.folder and again.metrics == run.metrics


def test_every_kind_of_setting_becomes_the_flag_that_means_it():
    given = {
        "data_path": Path("x"), "scale": [0.5, 1], "hflip": 0, "clip_grad": 1, "num_workers": None, "model_ema": False,
        "repeated_aug": True, "aa": "none", "opt": "lamb", "freeze": "backbone", "finetune": Path("y"), "seed": 3,
    }  # fmt: skip
    config = parse_config(api.arguments(given))
    assert (config.data.data_path, config.data.scale, config.data.hflip) == (Path("x"), (0.5, 1.0), 0.0)
    assert (config.optimization.clip_grad, config.data.num_workers, config.model.model_ema) == (1.0, None, False)
    assert (config.data.repeated_aug, config.data.aa, config.optimization.opt) == (True, "none", "lamb")
    assert (config.model.freeze, config.model.finetune, config.run.seed) == ("backbone", "y", 3)
    assert "--hflip" in config.typed and "--reprob" not in config.typed


def test_settings_of_a_file(tmp_path):
    (tmp_path / "settings.yaml").write_text("optimization: {epochs: 7, lr: 0.25}")
    config = parse_config(api.arguments({"config": tmp_path / "settings.yaml", "lr": 0.5}))
    assert (config.optimization.epochs, config.optimization.lr) == (7, 0.5)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"epoch": 3}, "train.. has no setting epoch; did you mean epochs"),
        ({"eval": True}, "no setting eval"),
        ({"epochs": "many"}, "epochs='many': expected int"),
        ({"epochs": True}, "epochs=True: expected int"),
        ({"epochs": 2.5}, "epochs=2.5: expected int"),
        ({"epochs": None}, "epochs=None: expected int"),
        ({"model_ema": 1}, "model_ema=1: expected bool"),
        ({"scale": 0.5}, "scale=0.5: expected tuple"),
        ({"scale": (0.5, 0.7, 1)}, "expected tuple"),
        ({"opt": "adam"}, "opt='adam': expected Literal"),
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
        ({"recipe": "deit_giant"}, "there is no such recipe"),
        ({"data_path": "/nowhere", "device": "cpu"}, "/nowhere"),
    ],
)
def test_settings_that_are_none(settings, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, ValueError), match=words):
        fastdeit.train(**settings)
    assert not list(tmp_path.glob("runs/*/checkpoints"))


def test_interrupting_keeps_the_program_alive(colors, tmp_path, monkeypatch):
    """No handlers of ours in somebody else's program: Ctrl-C, or a notebook's stop, is a KeyboardInterrupt."""
    import signal

    from fastdeit.training.trainer import Trainer

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    seen, step = [], Trainer.step

    def interrupted(self, *arguments):
        seen.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
        if self.state.step == 4:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fastdeit.train(colors, output_dir=tmp_path / "run", **SETTINGS)
    assert seen[0] == handlers
    monkeypatch.setattr(Trainer, "step", step)
    assert fastdeit.train(resume=str(tmp_path / "run")).history[-1]["epoch"] == 1


def test_importing_is_light():
    """No PyTorch before it is needed; the module that the command runs is the function that one calls."""
    code = """
import sys, fastdeit
assert not {"torch", "timm", "tyro", "fastdeit.api"} & set(sys.modules)
assert set(fastdeit.__all__) <= set(dir(fastdeit))
import fastdeit.train
from fastdeit import train
assert train is fastdeit.train is sys.modules["fastdeit.train"] and callable(train) and train.main
assert not {"torch", "timm", "tyro"} & set(sys.modules)
try:
    fastdeit.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "has no attribute 'nothing'" in done.stdout, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Using


@pytest.fixture(scope="module")
def model(run):
    return fastdeit.load(run, device="cpu")


@pytest.fixture(scope="module")
def files(colors):
    return sorted(str(path) for path in colors.glob("val/*/*.png"))


def test_predictions_are_those_of_the_command(model, files, run, cli):
    _, out, _ = cli(predict.main, run, *files, "--json", "--device", "cpu")
    told = [json.loads(line)["classes"] for line in out.splitlines()]
    found = model.predict(files, batch_size=5)
    assert [one.image for one in found] == files and all(one.error is None for one in found)
    for one, classes in zip(found, told):
        assert one.label == classes[0]["class"] and one.classes[0][1] == pytest.approx(classes[0]["probability"], 1e-5)
    folder = str(Path(files[0]).parents[1])
    assert model.predict(folder) == model.predict([Path(folder)]) == model.predict(f"{folder}/**/*.png")
    assert len(model.predict(files[0], top=2)[0].classes) == 2


def test_the_same_pixels_in_any_form(model, files):
    """Bit by bit the logits of the files: what is in memory passes the same crop, resize and normalisation."""
    expected = model.logits(files)
    pictures = [Image.open(file) for file in files]
    arrays = [np.asarray(picture) for picture in pictures]
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    forms = {
        "Pillow": pictures, "arrays": arrays, "tensors": tensors, "an array": np.stack(arrays),
        "a tensor": torch.stack(tensors), "floats": torch.stack(tensors) / 255, "int64": np.stack(arrays).astype(int),
        "a generator": (picture for picture in pictures),
    }  # fmt: skip
    for form, images in forms.items():
        assert torch.equal(model.logits(images, batch_size=5), expected), form
    for one in (pictures[0], arrays[0], tensors[0], files[0]):
        torch.testing.assert_close(model.logits(one), expected[:1], rtol=1e-5, atol=1e-5)
    found = model.predict(arrays)
    assert [one.classes for one in found] == [one.classes for one in model.predict(files)]
    assert [one.image for one in found][:2] == ["[0]", "[1]"]


def test_the_view_of_an_image_in_memory_is_that_of_its_file(tmp_path):
    """Of a large one too, and of one with a long side."""
    from fastdeit.pipelines import eval_loader, open_files

    rng = np.random.default_rng(0)
    shapes = [(50, 70), (120, 31), (9, 200), (24, 24)]
    arrays = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    names = [str(tmp_path / f"{i}.png") for i in range(len(arrays))]
    for name, array in zip(names, arrays):
        Image.fromarray(array).save(name)
    (batch,) = eval_loader(open_files(names), batch_size=4, input_size=24, crop_pct=0.8, num_threads=1)
    for image, array in zip(batch.images, arrays):
        assert torch.equal(image, evaluation_view(array, 24, 0.8))


def test_grey_and_alpha():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    wanted = torch.from_numpy(grey)[..., None].expand(-1, -1, 3)
    tensor = torch.from_numpy(grey)
    for form in (grey, grey[..., None], tensor, tensor[None], Image.fromarray(grey), np.stack([grey] * 4, -1)):
        assert torch.equal(as_pixels(form), wanted)
    assert torch.equal(as_pixels(np.array([[0.0, 0.5, 1.0]])), torch.tensor([[[0] * 3, [128] * 3, [255] * 3]]).byte())


@pytest.mark.parametrize(
    "images, words",
    [
        ([], "at least one image"),
        (np.zeros((5, 4, 4, 4, 3)), "of shape .4, 4, 4, 3. is no image"),
        (np.zeros((3, 20, 20)), "of shape .3, 20, 20. is no image: expected .height, width"),
        (torch.zeros(20, 20, 3), "is no image: expected .*height, width"),
        (torch.full((3, 4, 4), 2.0), "values from 2 to 2: expected 0 to 1, before any normalisation"),
        (torch.full((3, 4, 4), torch.nan), "values from nan"),
        (np.full((4, 4), 256), "values from 256 to 256: expected 0 to 255"),
        ([object()], "object is no image"),
        (["x.png", np.zeros((4, 4))], "do not go together"),
    ],
)
def test_what_is_no_image(model, images, words):
    with pytest.raises((UserError, ValueError), match=words):
        model.predict(images)


def test_a_file_that_cannot_be_read(model, files, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    found = model.predict([files[0], tmp_path / "bad.png"])
    assert found[0].label and found[1].label is None and found[1].error
    with pytest.raises(UserError, match=r"bad\.png"):
        model.logits([files[0], tmp_path / "bad.png"])
    with pytest.raises(ValueError, match=r"gone\.png"):
        model.logits([tmp_path / "gone.png"])


def test_heads(model, files):
    by_head = {head: model.logits(files, head=head) for head in ("cls", "dist", "both")}
    torch.testing.assert_close(by_head["both"], (by_head["cls"] + by_head["dist"]) / 2)
    first = model.predict(files[0], head="dist")[0]
    torch.testing.assert_close(first.classes[0][1], by_head["dist"][0].softmax(0).max().item())
    with torch.inference_mode():
        assert torch.equal(by_head["both"], model.network(next(model._batches(files, 64))))


def test_attention_is_of_each_image(model, files):
    maps = model.attention(files, batch_size=5)
    assert maps.shape == (12, 6, 4, 2, 4, 4) and (maps > 0).all() and (maps.sum((-1, -2)) < 1).all()
    torch.testing.assert_close(model.attention(Image.open(files[7])), maps[7:8], rtol=1e-4, atol=1e-6)


def test_evaluation_is_that_of_the_command(model, run, colors, cli, tmp_path):
    from fastdeit import evaluate

    _, out, _ = cli(evaluate.main, run, "--data-path", colors, "--json", "--device", "cpu")
    told, found = json.loads(out), model.evaluate(colors, output=tmp_path / "detail")
    assert {head: found[head] for head in ("cls", "dist", "both")} == told["model"] and found["data"] == told["data"]
    assert (tmp_path / "detail/confusion.png").is_file()


def test_what_is_loaded_is_said(model, run):
    assert repr(model) == f"<fastdeit.Classifier {run}: 3 classes, 16 pixels>"
    average = fastdeit.load(run, weights="ema", device="cpu", input_size=32)
    assert average.input_size == 32 and "interpolated" in average.notes[0]
    reference = inference.load(run, device="cpu", weights="ema")
    assert torch.equal(average.network.norm.weight, reference.model.norm.weight)
    with pytest.raises(UserError, match="no checkpoint"):
        fastdeit.load(run / "nothing")


# ---------------------------------------------------------------------------------------------------------------------
# In a notebook


def test_a_notebooks_bar(monkeypatch):
    """One output, updated; text of a run is escaped."""
    ipython = pytest.importorskip("IPython")
    shown = []

    class Handle:
        def update(self, what):
            shown.append(what.data)

    monkeypatch.setattr("IPython.display.display", lambda what, display_id: shown.append(what.data) or Handle())
    assert not notebook.in_notebook()
    monkeypatch.setattr(ipython, "get_ipython", lambda: type("Shell", (), {"kernel": 1})())
    assert notebook.in_notebook()
    from fastdeit.training.log import Log

    log = Log(None, total_steps=20, title="a<b")
    log.begin()
    log.train(step=5, epoch=0, loss=1.5, lr=1e-3, images_per_s=10.0, data_share=0.1)
    log.close()
    assert len(shown) == 3 and 'value="0" max="20"' in shown[0]
    assert 'value="5" max="20"' in shown[-1] and "a&lt;b  epoch 1  loss 1.500" in shown[-1]
