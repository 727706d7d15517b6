"""Cached logits: the same losses as with the live teacher, whichever processes wrote them and however often killed."""

import os
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdeit import teach, train
from fastdeit.cli import parse_config
from fastdeit.data import split
from fastdeit.distill import cache_writer, logit_cache
from fastdeit.distill.logit_cache import LogitCache
from fastdeit.distill.loss import Objective
from fastdeit.distributed.world import join
from fastdeit.errors import UserError
from fastdeit.kernels import distillation_loss

from . import logit_caches, runs
from .conftest import refused, write_folder
from .logit_caches import cached, changed, loader_with_targets, parts, same
from .processes import context, start_ranks
from .runs import assert_same, run_until

pytest.importorskip("tyro")
pytest.importorskip("nvidia.dali")

data_fixture, teacher_fixture = logit_caches.data_fixture, logit_caches.teacher_fixture
flags_fixture, cache_fixture = logit_caches.flags_fixture, logit_caches.cache_fixture


def losses(arguments, folder, monkeypatch, *, epochs=4):
    """(steps, 4): loss and terms of each step."""
    found, compute = [], Objective.__call__

    def recorded(self, *inputs):
        loss, terms = compute(self, *inputs)
        found.append(torch.cat([loss.detach().view(1), terms]))
        return loss, terms

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", recorded)
        runs.run(*arguments, "--epochs", epochs, "--output-dir", folder)
    return torch.stack(found)


def test_training_from_a_cache_has_the_losses_of_the_live_teacher(flags, cache, tmp_path, monkeypatch):
    live = losses(flags, tmp_path / "live", monkeypatch)
    from_cache = losses(cached(flags, cache), tmp_path / "cached", monkeypatch)
    assert len(live) == 4 * 6 and live.isfinite().all() and (live[:, 2] > 0).all()
    assert torch.equal(live, from_cache)
    labels = np.asarray(LogitCache(cache).arrays["labels"])
    assert (np.bincount(labels.ravel(), minlength=3) > 10).all(), "the teacher always predicts the same class"


def test_epochs_of_the_cache_are_used_in_turn(flags, cache, tmp_path):
    config = parse_config(cached(flags, cache))
    loader = loader_with_targets(config, cache)
    seen = []
    for epoch in (0, 1, 4, 5):
        loader.set_epoch(epoch)
        seen.append([(batch.indices.tolist(), batch.targets.tolist()) for batch in loader])
    assert seen[0] == seen[2] and seen[1] == seen[3] and seen[0] != seen[1]
    loader.set_epoch(5)
    loader.load_state_dict({"position": 4})
    assert [(batch.indices.tolist(), batch.targets.tolist()) for batch in loader] == seen[3][4:]
    assert len(loader) == 6 and loader.index.classes == ("blue", "green", "red")


def test_two_readers_get_the_halves_of_each_batch(flags, cache):
    arguments = cached(flags, cache)
    whole = [batch.targets for batch in loader_with_targets(parse_config(arguments), cache)]
    half = parse_config([*arguments, "--batch-size", "4"])
    halves = [[batch.targets for batch in loader_with_targets(half, cache, rank, 2)] for rank in (0, 1)]
    assert [torch.cat(pair).tolist() for pair in zip(*halves)] == [targets.tolist() for targets in whole]


def test_a_batch_in_parts_keeps_its_targets(flags, cache):
    batch = next(iter(loader_with_targets(parse_config(flags), cache)))
    halves = split(batch, 2)
    assert torch.equal(torch.cat([half.targets for half in halves]), batch.targets) and len(halves[1].targets) == 4
    soft = batch._replace(targets=(batch.targets[:, None], torch.rand(8, 1)))
    assert torch.equal(torch.cat([half.targets[1] for half in split(soft, 4)]), soft.targets[1])


def test_unlabelled_images_have_cached_targets_too(flags, data, tmp_path):
    """18 of them beside 48 with labels: 8 steps an epoch."""
    more, folder = write_folder(tmp_path / "more", train=6, val=2) / "train", tmp_path / "cache"
    arguments = [*flags, "--unlabelled-path", str(more)]
    teach.store([*arguments, "--views", "1", "--output", str(folder)])
    assert (np.asarray(LogitCache(folder).arrays["indices"]) >= 48).sum() > 10
    batches = list(loader_with_targets(parse_config(cached(arguments, folder)), folder))
    with join("cpu") as world:
        live = cache_writer.TeacherTargets(parse_config(arguments), world, ("blue", "green", "red"), 1)
    assert len(batches) == 8 and any((batch.labels == -100).any() for batch in batches)
    for batch in batches:
        assert torch.equal(live.teacher(live.prepare(batch)).argmax(1), batch.targets)
    with pytest.raises(UserError, match="data fingerprint"):
        loader_with_targets(parse_config(cached(flags, folder)), folder)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, and kills


def writing(arguments, environment, kill_after):
    """`teach store`, in a process of its own. It stops dead, as by kill -9 or a power cut, in the middle of the write
    `kill_after` (counted from 0) of rows."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    pwrite, written = os.pwrite, []

    def pwrite_and_die(file, content, offset):
        written.append(offset)
        if len(written) > kill_after:
            pwrite(file, content[: len(content) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return pwrite(file, content, offset)

    if kill_after is not None:
        logit_cache.PIECE_STEPS = 2
        os.pwrite = pwrite_and_die
    teach.store(list(map(str, arguments)))


def start_writing(*arguments, kill_after=None, **environment):
    environment = {name: str(value) for name, value in environment.items()}
    process = context.Process(target=writing, args=(arguments, environment, kill_after))
    process.start()
    return process


def ended(process):
    process.join(120)
    return process.exitcode


def test_two_processes_write_the_same_cache(flags, cache, tmp_path):
    arguments = [*flags, "--batch-size", 4, "--views", 4, "--output", tmp_path / "cache"]
    ranks = [
        start_writing(*arguments, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for port in [free_port()]
        for rank in (0, 1)
    ]
    assert [ended(rank) for rank in ranks] == [0, 0]
    same(tmp_path / "cache", cache)
    assert len(list((tmp_path / "cache" / "written").iterdir())) == 2
    assert not LogitCache(tmp_path / "cache").damaged()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_processes_train_on_it_as_with_the_live_teacher(flags, cache, tmp_path):
    arguments = [*flags, "--batch-size", "4", "--epochs", "1"]
    teachers = {"live": arguments, "cached": cached(arguments, cache)}
    for name, given in teachers.items():
        (tmp_path / f"logs {name}").mkdir()
        ranks = start_ranks(2, *given, "--output-dir", tmp_path / name, logs=tmp_path / f"logs {name}")
        assert [rank.wait(120) for rank in ranks] == [0, 0], ranks[0].text
    assert_same(tmp_path / "live", tmp_path / "cached")


def test_a_killed_command_resumes_where_it_stopped(flags, cache, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "cache"
    arguments = [*flags, "--views", "4", "--output", str(folder)]
    for kill_after in (9, 6):
        assert ended(start_writing(*arguments, kill_after=kill_after)) == -signal.SIGKILL
        with pytest.raises(UserError, match="not complete"):
            LogitCache(folder)
    monkeypatch.setattr(logit_cache, "PIECE_STEPS", 2)
    header = logit_cache.read_header(folder)
    # Each piece is 2 steps of 2 arrays, so 4 writes: 2 and then 1 pieces were written whole before the kills.
    left = logit_cache.missing(folder, header)
    assert left == logit_cache.pieces_of(header)[3:]
    with (folder / "written" / "rank-00000.jsonl").open("ab") as file:
        file.write(b'{"piece": [0, 4')  # a line that a kill cut short
    computed = []
    rows = cache_writer.TeacherTargets.rows
    monkeypatch.setattr(
        cache_writer.TeacherTargets, "rows", lambda self, batches: computed.append(1) or rows(self, batches)
    )
    teach.store(arguments)
    assert len(computed) == len(left)
    same(folder, cache)
    assert not LogitCache(folder).damaged()


# ---------------------------------------------------------------------------------------------------------------------
# What is in it


def test_soft_targets_keep_the_likeliest_classes(flags, tmp_path):
    arguments = [*flags, "--distillation-type", "soft", "--distillation-tau", "2"]
    teach.store([*arguments, "--views", "1", "--top", "2", "--output", str(tmp_path / "cache")])
    arrays = LogitCache(tmp_path / "cache").arrays
    assert {name: (str(array.dtype), array.shape) for name, array in arrays.items()} == {
        "indices": ("int32", (1, 48)), "classes": ("int16", (1, 48, 2)), "probabilities": ("float16", (1, 48, 2)),
    }  # fmt: skip
    config = parse_config(cached(arguments, tmp_path / "cache"))
    loader = loader_with_targets(config, tmp_path / "cache")
    with join("cpu") as world:
        live = cache_writer.TeacherTargets(parse_config(arguments), world, loader.index.classes, 2)
        batch = next(iter(loader))
        logits = live.teacher(live.prepare(batch))
    expected = (logits / 2).softmax(1)
    classes, probabilities = batch.targets
    torch.testing.assert_close(expected.gather(1, classes), probabilities, atol=1e-3, rtol=1e-3)
    assert torch.equal(classes[:, 0], expected.argmax(1))
    student = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    settings = {"kind": "soft", "tau": 2.0, "alpha": 1.0}
    cached_loss = distillation_loss(student, student, batch.labels, batch.targets, **settings)
    live_loss = distillation_loss(student, student, batch.labels, logits, **settings)
    assert cached_loss.item() == pytest.approx(live_loss.item(), abs=2e-3)
    with pytest.raises(UserError, match=r"tau is 2\.0 in the logit cache and 3\.0 here"):
        loader_with_targets(parse_config([*arguments, "--distillation-tau", "3"]), tmp_path / "cache")
    with pytest.raises(UserError, match='kind is "soft" in the logit cache and "hard" here'):
        loader_with_targets(parse_config([*arguments, "--distillation-type", "hard"]), tmp_path / "cache")


def test_of_equal_logits_the_first_is_the_argmax():
    logits = torch.tensor([[1.0, 3, 3, 2], [5, 5, 5, 5], [0, 1, 2, 3]])
    assert cache_writer.first_argmax(logits).tolist() == [1, 0, 3]


def test_many_classes_take_four_bytes():
    assert logit_cache.label_dtype(32768) == "int16" and logit_cache.label_dtype(32769) == "int32"


# ---------------------------------------------------------------------------------------------------------------------
# The cache, the teacher and the run at another time


def test_verify_agrees(cache, cli):
    code, out, err = cli(teach.main, "verify", cache)
    assert code == 0 and out == f"{cache}: all checksums agree\n", err


def test_verify_finds_damage(cache, tmp_path, cli):
    folder = changed(cache, tmp_path, lambda header: None)
    with (folder / "labels.npy").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    code, _, err = cli(teach.main, "verify", folder)
    assert code == 2 and "checksums differ at epoch 3" in err


def test_a_teacher_that_moved_is_the_same_and_one_weight_makes_another(cache, flags, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(Path(flags[flags.index("--teacher-path") + 1]), folder, symlinks=True)
    arguments = [*flags, "--teacher-path", str(folder), "--views", "4", "--output", str(cache)]
    teach.store(arguments)  # there is nothing left to write
    weights = next((folder / "last").glob("model.safetensors")).resolve()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="started with other settings: teacher weights"):
        teach.store(arguments)


def test_a_run_resumes_with_a_cache_that_moved(flags, cache, teacher, tmp_path, monkeypatch, cli):
    arguments = [*cached(flags, cache), "--output-dir", tmp_path / "run"]
    run_until(monkeypatch, 2, *arguments)
    shutil.copytree(cache, tmp_path / "moved")
    other = changed(cache, tmp_path, lambda header: header["teacher"].update(weights="00"))
    words = ["not the one the run was started with", "--teacher-store"]
    refused(cli, train.main, "--resume", tmp_path / "run", "--teacher-store", other, words=words)
    code, out, err = cli(train.main, "--resume", tmp_path / "run", "--teacher-store", tmp_path / "moved")
    assert code == 0 and "resumes at step 3" in out, err


def test_a_live_teacher_and_its_cache(cli, flags, cache):
    refused(cli, train.main, *flags, "--teacher-store", cache, words=["--teacher-path", "--teacher-store", "give one"])


def test_the_run_says_how_often_an_epoch_is_used(flags, cache):
    arguments = [*cached(flags, cache), "--epochs", "9"]
    sentences = parts(parse_config(arguments), cache)[0].check([])
    assert "up to 3 times" in sentences[1] and "4 epochs of 48 images, hard" in sentences[0]
    assert len(parts(parse_config([*arguments, "--epochs", "4"]), cache)[0].check([])) == 1


@pytest.mark.gpu
def test_on_a_gpu_the_same_targets_are_written_again(flags, tmp_path):
    for name in ("one", "other"):
        teach.store([*flags, "--device", "cuda", "--views", "2", "--output", str(tmp_path / name)])
    same(tmp_path / "one", tmp_path / "other")
