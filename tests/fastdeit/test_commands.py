"""The commands on a small folder: what they write, and what bad input gets."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fastdeit import evaluate, predict, teach, train
from fastdeit.export import __main__ as export_command

from . import runs
from .conftest import SMALL, refused, write_folder


def test_a_run_leaves_what_the_readme_says(run):
    for name in (
        "settings.json",
        "summary.json",
        "metrics.jsonl",
        "curves.png",
        "first_batch.png",
        "token_similarity.png",
    ):
        assert (run / name).stat().st_size > 0, name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["kind"] == "eval"] == [0, 1, 2]
    assert {"loss", "lr", "images_per_s", "data_share"} <= lines[0].keys()
    assert json.loads((run / "summary.json").read_text()).keys() == {"cls", "dist", "both"}
    for link in ("last", "best"):
        assert {path.name for path in (run / link).iterdir()} == {
            "config.json", "model.safetensors", "ema.safetensors", "training.pt",
        }  # fmt: skip


def test_timm_loads_the_checkpoint(run):
    import timm

    from fastdeit.models.inference import load

    theirs = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=16, patch_size=4, embed_dim=128, depth=6, num_heads=4, num_classes=3
    )
    theirs.load_state_dict(load_file(run / "last" / "model.safetensors"), strict=True)
    images = torch.randn(2, 3, 16, 16)
    ours = load(run, device="cpu").model
    torch.testing.assert_close(ours(images), theirs.eval()(images), atol=1e-5, rtol=1e-5)


def test_dry_run_writes_nothing(colors, tmp_path, cli):
    target = tmp_path / "run"
    code, out, _ = cli(train.main, *SMALL, "--data-path", colors, "--output-dir", target, "--dry-run")
    assert code == 0 and not target.exists()
    for words in ("(12, 16, 16, 3)", "peak memory", "two steps"):
        assert words in out, words


def test_fit_a_teacher_and_learn_from_it(colors, tmp_path, cli):
    fitted, student = tmp_path / "teacher", tmp_path / "student"
    options = "--input-size 32 --batch-size 12 --epochs 2 --warmup-epochs 0 --no-pretrained --num-workers 1".split()
    code, _, err = cli(
        teach.main, "fit", "--data-path", colors, "--model", "test_resnet", "--output-dir", fitted, *options
    )
    assert code == 0, err
    assert set(json.loads((fitted / "summary.json").read_text())) == {"cls"}
    code, _, err = cli(
        train.main, *SMALL, "--data-path", colors, "--output-dir", student, "--distillation-type", "hard",
        "--teacher-path", fitted,
    )  # fmt: skip
    assert code == 0, err
    assert set(json.loads((student / "summary.json").read_text())) == {"teacher", "cls", "dist", "both"}


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one sentence that names the thing and the remedy, exit code 2, nothing overwritten.


def test_a_wrong_path(cli, tmp_path):
    refused(cli, train.main, *SMALL, "--data-path", tmp_path / "absent", words=["absent"])


def test_an_empty_folder(cli, tmp_path):
    refused(cli, train.main, *SMALL, "--data-path", tmp_path, words=[str(tmp_path)])


def test_a_class_missing_in_val(cli, tmp_path):
    root = write_folder(tmp_path / "data", train=4, val=2)
    shutil.rmtree(root / "val" / "green")
    refused(cli, train.main, *SMALL, "--data-path", root, words=["green"])


@pytest.mark.parametrize(
    "model, words",
    [
        ("deit_tinny_patch16_224", ["did you mean", "deit_tiny_patch16_224"]),
        ("resnet5", ["did you mean", "resnet50"]),
        ("!", ["model_names()", "timm.list_models()"]),
    ],
)
def test_an_unknown_model(cli, colors, model, words):
    refused(cli, train.main, *SMALL, "--data-path", colors, "--model", model, words=words)


def test_a_file_where_a_folder_is_meant(cli, colors, run, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    data = ["--data-path", colors]
    refused(cli, train.main, *SMALL, "--data-path", file, words=[str(file), "no folder"])
    refused(cli, train.main, *SMALL, *data, "--output-dir", file, words=[str(file), "a file of this name"])
    refused(cli, train.main, *SMALL, *data, "--output-dir", file / "run", words=[str(file), "Not a directory"])
    refused(cli, train.main, "--resume", file, words=[str(file), "no run in this folder"])
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm/config.json").write_text('{"architecture": "deit_tiny_patch16_224"}')
    refused(cli, train.main, "--resume", tmp_path / "timm", words=["timm", "no run in this folder"])
    refused(cli, train.main, *data, "--eval", "--resume", tmp_path / "timm", words=["timm", "holds no checkpoint"])
    refused(cli, evaluate.main, run, *data, "--output", file / "out", words=[str(file), "Not a directory"])
    refused(
        cli, export_command.main, run, "--format", "timm", "--output", file / "out", words=[str(file), "File exists"]
    )
    storing = ["--distillation-type", "hard", "--teacher-path", run, "--views", 1, "--output", file]
    refused(cli, teach.main, "store", *SMALL, *data, *storing, words=[str(file), "a file of this name"])


@pytest.mark.parametrize("main", [evaluate.main, predict.main])
@pytest.mark.parametrize("flag, value", [("--input-size", "0"), ("--eval-crop-ratio", "2")])
def test_sizes_no_image_has(cli, colors, run, main, flag, value):
    images = ["--data-path", colors] if main is evaluate.main else [colors / "val"]
    refused(cli, main, run, *images, flag, value, words=[f"{flag} {value}"])


def test_a_teacher_of_other_classes(cli, run, tmp_path):
    root = write_folder(tmp_path / "data", train=12, val=2, colors={"cat": (9, 9, 9), "dog": (200, 200, 200)})
    refused(
        cli, train.main, *SMALL, "--data-path", root, "--distillation-type", "hard", "--teacher-path", run,
        words=["3 classes", "2 classes", "teach fit"],
    )  # fmt: skip


def test_a_batch_larger_than_the_data(cli, colors):
    refused(cli, train.main, *SMALL, "--data-path", colors, "--batch-size", 64, "--dry-run", words=["36", "64"])


def test_a_refused_run_leaves_no_folder(cli, colors, tmp_path):
    target = tmp_path / "run"
    arguments = [*SMALL, "--data-path", colors, "--output-dir", target]
    refused(cli, train.main, *arguments, "--bce-loss", words=["--smoothing 0"])
    assert not target.exists()
    code, _, err = cli(train.main, *arguments, "--epochs", "1")
    assert code == 0, err


def test_a_refused_run_leaves_an_empty_folder_of_the_users_empty(cli, colors, tmp_path):
    target = tmp_path / "run"
    target.mkdir(mode=0o750)
    before = target.stat().st_ino
    refused(
        cli, train.main, *SMALL, "--data-path", colors, "--output-dir", target, "--bce-loss", words=["--smoothing 0"]
    )
    assert target.stat().st_ino == before and not list(target.iterdir())


def test_a_run_that_does_not_fit_into_memory_leaves_no_folder(cli, colors, tmp_path):
    def too_much(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. It is full.")

    target = tmp_path / "run"
    command = [*SMALL, "--data-path", str(colors), "--output-dir", str(target)]
    refused(cli, lambda: runs.run(*command, on_micro_batch=too_much), words=["--batch-size"])
    assert not target.exists()


@pytest.mark.parametrize("flag", ["--teacher-path", "--teacher-store"])
def test_a_teacher_nobody_listens_to(cli, colors, flag):
    refused(cli, train.main, *SMALL, "--data-path", colors, flag, "t", words=[flag, "--distillation-type hard or soft"])


def test_attention_that_needs_a_gpu(cli, colors):
    flags = ["--data-path", colors, "--device", "cpu", "--attention", "xformers"]
    refused(cli, train.main, *SMALL, *flags, words=["CUDA"])


def test_a_folder_that_holds_another_run(cli, run, colors):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    refused(cli, train.main, *SMALL, "--data-path", colors, "--output-dir", run, words=["another run", "--resume"])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_teacher_without_weights(cli, colors):
    refused(
        cli, train.main, *SMALL, "--data-path", colors, "--distillation-type", "hard", "--teacher-model", "test_resnet",
        words=["test_resnet"],
    )  # fmt: skip


def test_unknown_teach_command(cli):
    refused(cli, teach.main, "learn", words=["fit"])


def test_synthetic_images_need_no_folder(cli):
    code, out, err = cli(train.main, *SMALL, "--data-path", "synthetic", "--dry-run")
    assert code == 0, err
    assert "(12, 16, 16, 3)" in out
