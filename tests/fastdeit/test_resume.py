"""A run that was stopped and resumed is the run that was never stopped, bit by bit."""

import json
import multiprocessing
import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastdeit import train
from fastdeit.checkpoint import files, resume, run_dir
from fastdeit.errors import UserError

from .conftest import write_folder
from .runs import RANDOM, assert_same, lines, run, run_until, step_of


@pytest.fixture(scope="module")
def straight(colors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(*RANDOM, "--data-path", colors, "--output-dir", folder)
    return folder


@pytest.mark.parametrize("step", [0, 2, 4])  # in the first epoch, at its edge, in the second
def test_resume_is_exact(straight, colors, tmp_path, monkeypatch, step):
    folder = tmp_path / "run"
    run_until(monkeypatch, step, *RANDOM, "--data-path", colors, "--output-dir", folder)
    assert step_of(folder) == step + 1
    run("--resume", folder, "--num-workers", 3)
    assert_same(straight, folder)


def test_resume_twice_with_the_same_command(straight, colors, tmp_path, monkeypatch):
    command = [*RANDOM, "--data-path", colors, "--output-dir", tmp_path / "run", "--resume", "auto"]
    run_until(monkeypatch, 3, *command)
    run_until(monkeypatch, 6, *command)
    run(*command)
    assert_same(straight, tmp_path / "run")


def test_resume_within_an_accumulated_step(colors, tmp_path, monkeypatch):
    command = [*RANDOM, "--data-path", colors, "--batch-size", 4, "--accumulate", 3, "--epochs", 2]
    run(*command, "--output-dir", tmp_path / "straight")
    run_until(monkeypatch, 1, *command, "--output-dir", tmp_path / "stopped", part=1)
    run("--resume", tmp_path / "stopped")
    assert_same(tmp_path / "straight", tmp_path / "stopped")


def test_accumulation_is_the_same_mathematics(colors, tmp_path, monkeypatch):
    """To fp32 rounding, and also when it begins in the middle: what counts is how many images a step sees. (With SGD:
    Adam makes full steps of gradients that are zero but for rounding, as those of the keys' biases.)"""
    command = [*RANDOM, "--data-path", colors, "--epochs", 2, "--opt", "sgd", "--lr", 0.1]
    run(*command, "--output-dir", tmp_path / "whole")
    run_until(monkeypatch, 1, *command, "--output-dir", tmp_path / "parts", "--batch-size", 6, "--accumulate", 2)
    run("--resume", tmp_path / "parts", "--batch-size", 4, "--accumulate", 3)
    assert_same(tmp_path / "whole", tmp_path / "parts", exact=False)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--precision", "fp16"], ["--compile"]])
def test_resume_is_exact_on_a_gpu(colors, tmp_path, monkeypatch, options):
    """In deterministic mode."""
    command = [*RANDOM, "--data-path", colors, "--device", "cuda", "--deterministic", *options]
    try:
        run(*command, "--output-dir", tmp_path / "straight")
        run_until(monkeypatch, 3, *command, "--output-dir", tmp_path / "stopped", late=2)
        run("--resume", tmp_path / "stopped")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(tmp_path / "straight", tmp_path / "stopped")


def test_a_kill_during_evaluation_repeats_only_that(straight, colors, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("fastdeit.training.loop.Loop.evaluate", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*RANDOM, "--data-path", colors, "--output-dir", folder)
    assert step_of(folder) == 3 and "accuracy" not in json.loads((folder / "last" / "config.json").read_text())
    run("--resume", folder)
    assert_same(straight, folder)


def test_a_timm_model_with_running_statistics(colors, tmp_path, monkeypatch):
    command = [*RANDOM, "--data-path", colors, "--epochs", 2, "--model", "test_resnet", "--input-size", 32]
    run(*command, "--output-dir", tmp_path / "straight")
    run_until(monkeypatch, 1, *command, "--output-dir", tmp_path / "stopped")
    run("--resume", tmp_path / "stopped")
    assert_same(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(colors, tmp_path, monkeypatch, precision):
    """With fp16 the gradient scaler is part of the state."""
    command = [*RANDOM, "--data-path", colors, "--epochs", 1, "--precision", precision]
    run(*command, "--output-dir", tmp_path / "straight")
    run_until(monkeypatch, 1, *command, "--output-dir", tmp_path / "stopped")
    state = files.training_state(tmp_path / "stopped" / "last")["scaler"]
    assert bool(state) == (precision == "fp16")
    run("--resume", tmp_path / "stopped")
    assert_same(tmp_path / "straight", tmp_path / "stopped")


def test_the_weights_a_run_began_with_may_be_gone(straight, colors, tmp_path, monkeypatch):
    weights = tmp_path / "weights.safetensors"
    shutil.copy(straight / "last" / "model.safetensors", weights)
    command = [*RANDOM, "--data-path", colors, "--finetune", weights, "--epochs", 1]
    run(*command, "--output-dir", tmp_path / "straight")
    run_until(monkeypatch, 1, *command, "--output-dir", tmp_path / "stopped", "--resume", "auto")
    weights.unlink()
    run(*command, "--output-dir", tmp_path / "stopped", "--resume", "auto")
    assert_same(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("optimizer", ["lamb", "sgd"])
def test_other_optimizers(colors, tmp_path, monkeypatch, optimizer):
    command = [*RANDOM, "--data-path", colors, "--epochs", 1, "--opt", optimizer]
    run(*command, "--output-dir", tmp_path / "straight")
    run_until(monkeypatch, 1, *command, "--output-dir", tmp_path / "stopped")
    run("--resume", tmp_path / "stopped")
    assert_same(tmp_path / "straight", tmp_path / "stopped")


def test_the_comparison_run_goes_on_too(colors, tmp_path, monkeypatch, capfd):
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "teacher.safetensors")
    command = [*RANDOM, "--data-path", colors, "--epochs", 1, "--compare-undistilled", "--distillation-type", "hard"]
    command += ["--teacher-model", "test_resnet", "--teacher-path", tmp_path / "teacher.safetensors"]
    table = run(*command, "--output-dir", tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr("fastdeit.training.run.run_undistilled", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*command, "--output-dir", tmp_path / "run")
    # The student is finished; the comparison is stopped in its second step, then finished.
    capfd.readouterr()
    run_until(monkeypatch, 1, "--resume", tmp_path / "run")
    assert step_of(tmp_path / "run" / "undistilled") == 2
    told = f"saved at step 2 of 3; resume by: python -m fastdeit.train --resume {tmp_path / 'run'}"
    assert told in capfd.readouterr().out.replace("\n", "")
    assert run("--resume", tmp_path / "run") == table
    for part in ("", "undistilled"):
        assert_same(tmp_path / "straight" / part, tmp_path / "run" / part)


def test_a_finished_run_prints_its_table(straight, cli):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()}
    code, out, _ = cli(train.main, "--resume", straight)
    assert code == 0 and "both heads, averaged" in out and "is finished" in out
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()} == before


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [
        {"kind": "train", "step": 50, "epoch": 0}, {"kind": "train", "step": 60, "epoch": 0},
        {"kind": "eval", "step": 60, "epoch": 0}, {"kind": "train", "step": 100, "epoch": 1},
    ]  # fmt: skip
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(text + '{"kind": "train", "st')
    resume.cut_metrics(path, step=80, epochs_evaluated=1)
    assert [json.loads(line) for line in path.read_text().splitlines()] == records[:3]
    resume.cut_metrics(path, step=60, epochs_evaluated=0)
    assert [json.loads(line) for line in path.read_text().splitlines()] == records[:2]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, in a sentence that names the flag and the remedy


@pytest.fixture
def stopped(straight, tmp_path):
    """A copy of the run, as it was before its end."""
    shutil.copytree(straight, tmp_path / "stopped", symlinks=True)
    (tmp_path / "stopped" / "summary.json").unlink()
    return tmp_path / "stopped"


def refused(words, *arguments):
    with pytest.raises(UserError) as error:
        run(*arguments)
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize(
    "flag, value", [("--lr", 0.1), ("--epochs", 9), ("--drop-path", 0.5), ("--seed", 1), ("--opt", "sgd")]
)
def test_flags_that_change_the_mathematics(stopped, flag, value):
    before = lines(stopped)
    refused([flag, str(value), "keeps its settings"], "--resume", stopped, flag, value)
    assert lines(stopped) == before


def test_auto_refuses_another_run(stopped, colors):
    refused(
        ["--mixup", "0.8", str(stopped)],
        *RANDOM, "--data-path", colors, "--output-dir", stopped, "--resume", "auto", "--mixup", 0.5,
    )  # fmt: skip


def test_auto_needs_a_folder(colors):
    refused(["--output-dir"], *RANDOM, "--data-path", colors, "--resume", "auto")


def test_another_batch(stopped):
    refused(["12 images", "--accumulate"], "--resume", stopped, "--batch-size", 6)


def test_other_data(stopped, tmp_path):
    other = write_folder(tmp_path / "other", train=13)
    refused([str(other), "--data-path"], "--resume", stopped, "--data-path", other)


def test_data_that_moved(straight, colors, tmp_path, monkeypatch):
    shutil.copytree(colors, tmp_path / "moved")
    folder = tmp_path / "run"
    run_until(monkeypatch, 4, *RANDOM, "--data-path", tmp_path / "moved", "--output-dir", folder)
    shutil.rmtree(tmp_path / "moved")
    run("--resume", folder, "--data-path", colors)
    assert_same(straight, folder)


def teaching(home):
    return [
        "--distillation-type", "hard", "--teacher-path", home / "teacher", "--teacher-classes", home / "classes.txt",
        "--unlabelled-path", home / "more",
    ]  # fmt: skip


def test_a_teacher_and_images_that_moved(straight, colors, tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(straight / "last", here / "teacher")
    shutil.copytree(colors / "val", here / "more")
    (here / "classes.txt").write_text("blue\nred\ngreen\n")
    command = [*RANDOM, "--data-path", colors, *teaching(here), "--epochs", 2]
    run(*command, "--output-dir", tmp_path / "straight")
    folder = tmp_path / "run"
    run_until(monkeypatch, 1, *command, "--output-dir", folder)
    here.rename(there)
    for change, words in (
        (lambda: flip_a_bit(there / "teacher" / "model.safetensors"), ["not the one", "--teacher-path"]),
        (lambda: (there / "classes.txt").write_text("blue\ngreen\nred\n"), ["not the one", "--teacher-path"]),
        (lambda: (there / "more" / "red" / "0.png").unlink(), [f"{there / 'more'} are not", "--unlabelled-path"]),
    ):
        shutil.copytree(there, tmp_path / "kept", dirs_exist_ok=True)
        change()
        refused(words, "--resume", folder, *teaching(there))
        shutil.copytree(tmp_path / "kept", there, dirs_exist_ok=True)
    run("--resume", folder, *teaching(there))
    assert_same(tmp_path / "straight", folder)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_no_run_there(tmp_path):
    refused([str(tmp_path), "no run"], *RANDOM, "--resume", tmp_path)


def test_a_run_another_process_works_on(stopped):
    ready, done = multiprocessing.Barrier(2), multiprocessing.Event()
    holder = multiprocessing.get_context("fork").Process(target=hold_lock, args=(stopped, ready, done))
    holder.start()
    ready.wait(20)
    try:
        refused([str(stopped), "another process"], "--resume", stopped)
    finally:
        done.set()
        holder.join()


def hold_lock(folder, ready, done):
    lock = run_dir._lock(folder)
    ready.wait()
    done.wait(20)
    lock.close()


# ---------------------------------------------------------------------------------------------------------------------
# --eval


def test_eval_says_what_the_run_said(straight, colors, cli, tmp_path, monkeypatch):
    summary = json.loads((straight / "summary.json").read_text())
    for source in (straight, straight / "last"):
        code, out, err = cli(train.main, "--eval", "--resume", source)
        assert code == 0, err
        assert out.count(f"{100 * summary['cls']:.2f}") >= 1 and "moving average" in out and "distillation head" in out
    weights = straight / "last" / "model.safetensors"
    code, out, err = cli(train.main, *RANDOM, "--data-path", colors, "--eval", "--finetune", weights)
    assert code == 0 and "moving average" not in out, err
    assert f"{100 * summary['both']:.2f}" in out


def test_eval_of_nothing(colors, cli):
    code, _, err = cli(train.main, *RANDOM, "--data-path", colors, "--eval")
    assert code == 2 and "--resume RUN or --finetune" in err


def test_training_goes_on_from_runs_only(stopped):
    refused(["settings.json", "no run"], "--resume", stopped / "best")
