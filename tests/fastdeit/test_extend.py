"""When a run ends: --patience before its last epoch, and --extend, which trains on after it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fastdeit import train
from fastdeit.pipelines import Loader

from . import runs
from .conftest import refused, write_folder

pytest.importorskip("nvidia.dali")
STILL = ["--lr", 0, "--warmup-lr", 0, "--min-lr", 0, "--epochs", 7]  # the first evaluation is the best there will be


def progress(folder) -> dict:
    return json.loads((folder / "last/config.json").read_text())["progress"]


def test_patience_counts_evaluations_without_a_better_top1(colors, monkeypatch, tmp_path, capfd):
    flags = [*runs.RANDOM, "--data-path", colors, *STILL, "--patience", 2]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    summary = runs.run(*flags, "--output-dir", whole)
    assert runs.step_of(whole) == 9 and progress(whole)["epochs_evaluated"] == 3
    assert "in 2 evaluations; ends at epoch 3 of 7" in capfd.readouterr().out
    runs.run_until(monkeypatch, 7, *flags, "--output-dir", stopped)
    runs.run("--resume", stopped)
    runs.assert_same(whole, stopped)

    capfd.readouterr()
    assert runs.run("--resume", whole) == summary and "is finished" in capfd.readouterr().out
    runs.run("--resume", whole, "--patience", 4)
    assert runs.step_of(whole) == 15 and [line["epoch"] for line in runs.lines(whole) if line["kind"] == "eval"] == [
        *range(5)
    ]


def test_a_better_top1_renews_patience(colors, monkeypatch, tmp_path):
    """Scores 1, 1, 2, 2, 1 of any head: with a patience of 2 the run ends after the fifth."""
    scores = iter([(0.1, 0.1), (0.1, 0.1), (0.1, 0.2), (0.2, 0.1), (0.1, 0.1), (0.9, 0.9)])

    def evaluate(loop):
        return {"model": {head: {"top1": score} for head, score in zip(("cls", "dist"), next(scores))}}

    monkeypatch.setattr("fastdeit.training.loop.Loop.evaluate", evaluate)
    runs.run(*runs.RANDOM, "--data-path", colors, *STILL, "--patience", 2, "--output-dir", tmp_path / "run")
    assert progress(tmp_path / "run")["epochs_evaluated"] == 5 and progress(tmp_path / "run")["best"] == 0.2
    assert runs.step_of(tmp_path / "run") == 15
    assert json.loads((tmp_path / "run/best/config.json").read_text())["step"] == 9


@pytest.fixture(scope="module")
def finished(colors, tmp_path_factory):
    """Three epochs of three steps, evaluated. Not to be written to."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    runs.run(*runs.RANDOM, "--data-path", colors, "--output-dir", folder)
    return folder


def test_an_extended_run_goes_on_from_the_end(finished, tmp_path, monkeypatch, capfd):
    """Weights, moving average, moments and order continue; the learning rate begins anew; settings may be others."""
    began, epochs, set_epoch = {}, [], Loader.set_epoch

    def look(trainer):
        if not began:
            tensors = trainer.tensors()
            began.update({name: {k: t.clone() for k, t in tensors[name].items()} for name in ("model", "ema")})
            began["optimizer"] = tensors["training"]["optimizer"]["state"][0]["step"].item()
            began["groups"] = [(group["weight_decay"], group["betas"]) for group in trainer.optimizer.param_groups]
            began["rates"] = []
        began["rates"].append(trainer.lr())

    monkeypatch.setattr(Loader, "set_epoch", lambda self, epoch: (epochs.append(epoch), set_epoch(self, epoch))[1])
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    further = ["--epochs", 5, "--weight-decay", 0.3, "--warmup-epochs", "1", "--lr", 2e-3]
    runs.run("--extend", finished, "--output-dir", tmp_path / "run", *further, on_micro_batch=look)
    assert "from epoch 3 to 5: another run; the learning rate begins anew" in capfd.readouterr().out

    for name in ("model", "ema"):
        saved = load_file(finished / f"last/{name}.safetensors")
        assert all(torch.equal(began[name][key], tensor) for key, tensor in saved.items())
    assert began["optimizer"] == 9
    assert began["groups"] == [(0.3, (0.9, 0.999)), (0.0, (0.9, 0.999))]
    # Warm-up over the first three of six steps, then the cosine's second half.
    cosine = [1e-5 + (2e-3 - 1e-5) * (1 + torch.tensor(torch.pi * s / 6).cos().item()) / 2 for s in (3, 4, 5)]
    assert began["rates"] == pytest.approx([1e-6 + (2e-3 - 1e-6) * s / 3 for s in range(3)] + cosine)
    assert [epoch for epoch in epochs if epoch] == [3, 4], "the views of epochs that were not seen yet"
    assert runs.step_of(tmp_path / "run") == 15
    assert [(line["step"], line["epoch"]) for line in runs.lines(tmp_path / "run")] == [
        (12, 3),
        (12, 3),
        (15, 4),
        (15, 4),
    ]
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_an_extended_run_resumes_to_the_same_bits(finished, tmp_path, monkeypatch):
    """Before its first checkpoint from the run it extends, after that without it."""
    base = tmp_path / "base"
    shutil.copytree(finished, base, symlinks=True)
    flags = ["--extend", base, "--epochs", 5]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    runs.run(*flags, "--output-dir", whole)
    for step in (10, 13):
        runs.run_until(monkeypatch, step, *flags, "--resume", "auto", "--output-dir", stopped)
        shutil.rmtree(base, ignore_errors=True)
    runs.run("--resume", stopped)
    runs.assert_same(whole, stopped)


def test_what_cannot_be_extended(finished, run, colors, cli, tmp_path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished, unfinished, symlinks=True)
    (unfinished / "summary.json").unlink()
    other = write_folder(tmp_path / "other", colors={"black": (0, 0, 0), "green": (0, 255, 0), "red": (255, 0, 0)})
    for run, flags, words in (
        (finished, [], ["it has 3 epochs already", "--epochs 6"]),
        (unfinished, ["--epochs", 5], ["is not finished", f"--resume {unfinished}"]),
        (tmp_path, ["--epochs", 5], [f"--extend {tmp_path}", "no run"]),
        (finished, ["--epochs", 5, "--opt", "lamb"], ["--opt lamb", "has adamw", f"--finetune {finished}"]),
        (finished, ["--epochs", 5, "--layer-decay", 0.5], ["--layer-decay 0.5", "has None"]),
        (finished, ["--epochs", 5, "--data-path", other], ["other classes", f"--finetune {finished}"]),
        (finished, ["--epochs", 5, "--compare-undistilled"], ["--compare-undistilled"]),
    ):
        refused(cli, train.main, "--extend", run, *flags, "--output-dir", tmp_path / "new", words=words)
        assert not (tmp_path / "new").exists()
    refused(cli, train.main, "--resume", finished, "--epochs", 5, words=[f"--extend {finished} --epochs N"])
