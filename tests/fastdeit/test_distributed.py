"""Several processes (gloo, CPU): the numbers of one, one checkpoint for all, one end for all."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from fastdeit.checkpoint import files

from .conftest import write_folder
from .processes import At, die, fail, start_ranks, terminate
from .runs import RANDOM, assert_same, assert_same_losses, run, run_until, step_of

# With SGD, weights can be compared: Adam makes full steps of gradients that are zero but for rounding.
COMMAND = [*RANDOM, "--epochs", "2", "--opt", "sgd", "--lr", "0.1", "--patch-drop", "0.25"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """13 validation images: no number of processes divides them."""
    return write_folder(
        tmp_path_factory.mktemp("data") / "colors",
        train=12,
        val=13,
        colors={"red": (210, 50, 40), "blue": (40, 60, 200)},
    )


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(*COMMAND, "--data-path", data, "--output-dir", folder)
    return folder


def finish(ranks, seconds=120):
    codes = [rank.wait(seconds) for rank in ranks]
    assert codes == [0] * len(ranks), "\n".join(rank.text for rank in ranks)


@pytest.mark.parametrize(
    "processes, options",
    [
        (2, ["--batch-size", 6]),
        (4, ["--batch-size", 3, "--mixup", 0, "--cutmix", 0]),
        (2, ["--batch-size", 2, "--accumulate", 3, "--sharding", "fsdp"]),
        pytest.param(2, ["--batch-size", 2, "--accumulate", 3], marks=pytest.mark.soak),
        pytest.param(2, ["--batch-size", 6, "--sharding", "fsdp"], marks=pytest.mark.soak),
    ],
)
def test_the_numbers_of_one_process(alone, data, tmp_path, processes, options):
    folder = tmp_path / "run"
    if "--mixup" in options:  # three images a process cannot be mixed in pairs
        alone = tmp_path / "alone"
        run(*COMMAND, "--data-path", data, "--output-dir", alone, "--mixup", 0, "--cutmix", 0)
    finish(start_ranks(processes, *COMMAND, "--data-path", data, "--output-dir", folder, *options, logs=tmp_path))
    assert_same(alone, folder, exact=False)
    counted = [files.description(run / "last")["accuracy"] for run in (alone, folder)]
    for source in ("model", "ema"):
        for head, values in counted[0][source].items():  # shares of 26 images, to the last one
            assert counted[1][source][head]["top1"] == values["top1"]


def test_a_sharded_run_goes_on_alone(alone, data, tmp_path):
    """Its checkpoint is like any other. One rank is told to stop; all save, and leave together."""
    folder = tmp_path / "run"
    command = [*COMMAND, "--data-path", data, "--output-dir", folder, "--batch-size", 6, "--sharding", "fsdp"]
    ranks = start_ranks(2, *command, logs=tmp_path, on_micro_batch={1: At(2, terminate)})
    assert [rank.wait() for rank in ranks] == [128 + signal.SIGTERM] * 2, ranks[0].text
    assert step_of(folder) == 3 and "saved at step 3" in ranks[0].text
    saved = files.read(folder / "last")
    assert {name: value.shape for name, value in saved["model"].items()} == {
        name: value.shape for name, value in files.read(alone / "last")["model"].items()
    }
    run("--resume", folder, "--batch-size", 12)
    assert_same(alone, folder, exact=False)


def test_a_run_alone_goes_on_sharded(alone, data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run_until(monkeypatch, 1, *COMMAND, "--data-path", data, "--output-dir", folder)
    finish(start_ranks(2, "--resume", folder, "--batch-size", 6, "--sharding", "fsdp", logs=tmp_path))
    assert_same(alone, folder, exact=False)


def test_another_global_batch_is_refused_by_all(alone, tmp_path):
    folder = shutil.copytree(alone, tmp_path / "run", symlinks=True)
    (folder / "summary.json").unlink()
    # From this file torchrun makes its closing report.
    ranks = start_ranks(2, "--resume", folder, logs=tmp_path, TORCHELASTIC_ERROR_FILE=tmp_path / "error.json")
    assert [rank.wait() for rank in ranks] == [2, 2]
    for text in (ranks[0].text, (tmp_path / "error.json").read_text()):
        assert "12 images" in text and "Traceback" not in text


@pytest.mark.parametrize("action, cause", [(die, "lost another rank"), (fail, "the planned failure")])
def test_a_rank_that_ends_ends_the_job(data, tmp_path, action, cause):
    since = time.monotonic()
    command = [*COMMAND, "--data-path", data, "--output-dir", tmp_path / "run", "--batch-size", 6]
    ranks = start_ranks(2, *command, logs=tmp_path, on_micro_batch={1: At(2, action)})
    codes = [rank.wait() for rank in ranks]
    assert 0 not in codes and time.monotonic() - since < 60
    witness = ranks[0 if action is die else 1].text
    assert re.search(r"rank \d of 2 on \S+ \(cpu\) ends", witness) and cause in witness
    assert ("Traceback" in witness) == (action is fail)  # whoever has lost another only says so
    assert step_of(tmp_path / "run") == 2  # the end of the first epoch
    files.read(tmp_path / "run" / "last")


def spoil_the_loss(trainer):
    """In step 3."""
    if trainer.state.step == 3:
        objective = trainer.objective
        trainer.objective = lambda *args: [float("nan") * value for value in objective(*args)]


def test_a_bad_loss_of_one_rank_holds_all(data, tmp_path):
    folder = tmp_path / "run"
    command = [*COMMAND, "--data-path", data, "--output-dir", folder, "--batch-size", 6]
    ranks = start_ranks(2, *command, logs=tmp_path, on_micro_batch={1: spoil_the_loss})
    assert [rank.wait() for rank in ranks] == [2, 2]
    assert "step 3: the class term is nan" in ranks[0].text and "on rank 1" in ranks[0].text
    assert step_of(folder) == 3
    record = json.loads((folder / "nonfinite.jsonl").read_text())
    assert [len(rank["files"]) for rank in record["ranks"]] == [6, 6]
    assert all(value.isfinite().all() for value in files.read(folder / "last")["model"].values())


@pytest.mark.soak
@pytest.mark.parametrize("optimizer", ["lamb", "adamw", "muon"])
def test_other_optimizers_sharded(data, tmp_path, optimizer):
    command = [*COMMAND, "--data-path", data, "--opt", optimizer, "--lr", 3e-3]
    run(*command, "--output-dir", tmp_path / "alone")
    options = ["--batch-size", 6, "--sharding", "fsdp", "--output-dir", tmp_path / "run"]
    finish(start_ranks(2, *command, *options, logs=tmp_path))
    assert_same_losses(tmp_path / "alone", tmp_path / "run")


@pytest.mark.soak
def test_torchrun_restarts_go_on(alone, data, tmp_path):
    """torchrun itself: rank 1 is killed in step 3 of the first attempt; the second ends where one process ends."""
    folder = tmp_path / "run"
    command = [*COMMAND, "--data-path", data, "--output-dir", folder, "--batch-size", 6, "--resume", "auto"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--max-restarts", 1]
    result = subprocess.run(
        [*map(str, torchrun), "-m", "tests.fastdeit.fragile", *map(str, command)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "resumes at step 2" in result.stdout
    assert_same(alone, folder, exact=False)


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_torchrun_reaches_all_ranks(data, tmp_path, number):
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--shutdown-timeout", 120]
    torchrun += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "-m", "fastdeit.train"]
    command = [*COMMAND, "--data-path", data, "--output-dir", folder, "--batch-size", 6, "--epochs", 1000]
    with log.open("w") as output:
        job = subprocess.Popen([*map(str, torchrun), *map(str, command)], stdout=output, stderr=output)
    while not (folder / "last").exists() and job.poll() is None:
        time.sleep(0.1)
    job.send_signal(number)
    assert job.wait(120) != 0
    text = log.read_text()
    assert f"{number.name}: finishing this step" in text or f"{number.name}: ending" in text, text
    assert "Traceback" not in text.split(number.name)[1].split("SignalException")[0], text
    files.read(folder / "last")


@pytest.mark.soak
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_compiled_on_several_processes(alone, data, tmp_path, sharding):
    """Stopped and resumed in between; compiled code sums in another order, so to fp32 rounding."""
    folder = tmp_path / "run"
    command = [*COMMAND, "--data-path", data, "--output-dir", folder, "--batch-size", 6, "--compile"]
    command += ["--sharding", sharding, "--resume", "auto"]
    ranks = start_ranks(2, *command, logs=tmp_path, on_micro_batch={0: At(1, terminate)})
    assert [rank.wait(600) for rank in ranks] == [128 + signal.SIGTERM] * 2, ranks[0].text
    finish(start_ranks(2, *command, logs=tmp_path), seconds=600)
    assert_same(alone, folder, exact=False)
