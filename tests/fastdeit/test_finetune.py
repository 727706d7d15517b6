"""Runs that begin with weights: what they take over, say and remember; and --eval of what they left."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fastdeit import evaluate, predict, train
from fastdeit.export.__main__ import main as export_command
from fastdeit.export.formats import export
from fastdeit.models.loading import load_model

from .conftest import SMALL

pytest.importorskip("nvidia.dali")
MEAN, STD = (0.3, 0.35, 0.4), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """A folder of timm's kind, with a normalisation of its own and its classes in another order than the data's."""
    loaded = load_model(run)
    folder = tmp_path_factory.mktemp("exported") / "timm"
    changes = {"classes": ("red", "blue", "green"), "mean": MEAN, "std": STD, "crop_pct": 0.7}
    export(replace(loaded, **changes), "timm", folder)
    return folder


def test_a_start_from_a_folder_and_its_resume(exported, colors, cli, tmp_path):
    """What was done to the weights is printed and logged; the normalisation is the weights', in the run, in what it
    leaves, and when it is resumed without the folder it began with."""
    arguments = [
        "--recipe", "finetune", "--data-path", colors, "--output-dir", tmp_path / "run", "--finetune", exported,
        *"--batch-size 12 --warmup-epochs 0 --num-workers 1 --epochs 1 --tracker none --device cpu".split(),
    ]  # fmt: skip
    code, out, err = cli(train.main, *arguments)
    assert code == 0, err
    for words in (f"starts from {exported}/model.safetensors", "the rows of head are put into the order of the data's"):
        assert words in out + err
    saved = json.loads((tmp_path / "run/last/config.json").read_text())
    assert (saved["mean"], saved["std"], saved["input_size"], saved["eval_crop_ratio"]) == ([*MEAN], [*STD], 16, 0.7)
    assert saved["model"] == "deit_nano_distilled_patch4_16" and saved["classes"] == ["blue", "green", "red"]

    (tmp_path / "run/summary.json").unlink()
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    settings["model"]["finetune"] = str(tmp_path / "gone")
    settings["optimization"]["epochs"] = 2
    (tmp_path / "run/settings.json").write_text(json.dumps(settings))
    code, out, err = cli(train.main, "--resume", tmp_path / "run")
    assert code == 0, err
    saved = json.loads((tmp_path / "run/last/config.json").read_text())
    assert saved["step"] == 6 and (saved["mean"], saved["std"]) == ([*MEAN], [*STD])


def test_eval_is_at_the_checkpoints_size_and_crop(run, colors, cli):
    """Whatever names the run, with the recipe's 224 pixels and 0.875 as defaults; a typed flag outranks."""
    data = ["--data-path", colors, "--eval", "--device", "cpu"]
    defaults = ["--recipe", "deit_small", *data]
    tables = []
    auto = ["--resume", "auto", "--output-dir"]
    for flags, source in ((defaults, ["--finetune"]), (defaults, auto), (data, ["--resume"])):
        code, out, err = cli(train.main, *flags, *source, run)
        assert code == 0, err
        assert "12 images of 3 classes at 16 x 16 pixels, crop_pct 1" in out
        tables.append(out)
    assert tables[0] == tables[1] == tables[2]
    code, out, _ = cli(train.main, *defaults, "--finetune", run, "--input-size", 32, "--eval-crop-ratio", 0.5)
    assert code == 0 and "at 32 x 32 pixels, crop_pct 0.5" in out and "interpolated from 16 patches to 8 x 8" in out


def test_a_teacher_says_what_was_done_to_it(run, colors, cli, tmp_path):
    teaching = ["--distillation-type", "hard", "--teacher-path", run, "--teacher-input-size", 32]
    arguments = [*SMALL, *teaching, "--data-path", colors, "--epochs", 1, "--output-dir", tmp_path / "run"]
    code, out, err = cli(train.main, *arguments, "--tracker", "none")
    assert code == 0, err
    assert f"the teacher {run}: position embedding interpolated from 16 patches to 8 x 8 (bicubic)" in out + err


def test_the_comparison_run_starts_from_the_same_weights(exported, run, colors, cli, tmp_path):
    """Distillation token included; and is resumed when the folder they came from is gone."""
    arguments = [
        *SMALL, "--data-path", colors, "--epochs", 1, "--output-dir", tmp_path / "run", "--tracker", "none",
        *("--distillation-type", "hard", "--teacher-path", run, "--compare-undistilled", "--finetune", exported),
        *("--lr", 1e-5, "--unscale-lr", "--min-lr", 1e-6),
    ]  # fmt: skip
    code, _, err = cli(train.main, *arguments)
    assert code == 0, err
    assert "undistilled" in json.loads((tmp_path / "run/summary.json").read_text())
    twin = tmp_path / "run/undistilled"
    began, ended = (load_file(path) for path in (exported / "model.safetensors", twin / "last/model.safetensors"))
    assert began.keys() == ended.keys() and not torch.equal(began["dist_token"], ended["dist_token"])
    for name, tensor in began.items():
        if not name.startswith("head"):  # whose rows are put into the order of the data's classes
            torch.testing.assert_close(ended[name], tensor, rtol=0, atol=1e-4)

    (tmp_path / "run/summary.json").unlink()
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    settings["model"]["finetune"] = str(tmp_path / "gone")
    settings["optimization"]["epochs"] = 2
    (tmp_path / "run/settings.json").write_text(json.dumps(settings))
    code, _, err = cli(train.main, "--resume", tmp_path / "run")
    assert code == 0, err
    saved = json.loads((twin / "last/config.json").read_text())
    assert saved["step"] == 6 and (saved["mean"], saved["std"]) == ([*MEAN], [*STD])


def test_a_folder_of_transformers_in_every_command(run, colors, cli, tmp_path):
    """predict, evaluate and export say of it what they say of the run it was exported from."""
    pytest.importorskip("transformers")
    folder, image = tmp_path / "transformers", colors / "val/red/0.png"
    assert cli(export_command, run, "--format", "transformers", "--output", folder)[0] == 0
    shown = [cli(predict.main, source, image, "--json") for source in (run, folder)]
    assert [code for code, *_ in shown] == [0, 0]
    ours, theirs = (json.loads(out)["classes"] for _, out, _ in shown)
    assert [entry["class"] for entry in ours] == [entry["class"] for entry in theirs]
    for one, other in zip(ours, theirs):
        assert one["probability"] == pytest.approx(other["probability"], rel=1e-3)
    measured = [cli(evaluate.main, source, "--data-path", colors, "--json") for source in (run, folder)]
    ours, theirs = (json.loads(out) for _, out, _ in measured)
    assert theirs["data"] == ours["data"] and theirs["model"].keys() == {"cls", "dist", "both"}
    for head, figures in theirs["model"].items():
        assert figures == pytest.approx(ours["model"][head], rel=1e-4)
    assert cli(export_command, folder, "--format", "timm", "--output", tmp_path / "timm")[0] == 0
    for name, tensor in load_model(run).model.state_dict().items():
        torch.testing.assert_close(load_file(tmp_path / "timm/model.safetensors")[name], tensor, rtol=0, atol=0)
