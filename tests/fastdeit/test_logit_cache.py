"""Cached logits: the same losses as with the live teacher, whichever processes wrote them and however often killed."""

import json
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
from fastdeit.distill import cache_writer, cached_teacher, logit_cache
from fastdeit.distill.logit_cache import LogitCache
from fastdeit.distill.loss import Objective
from fastdeit.distributed.world import join
from fastdeit.errors import UserError
from fastdeit.kernels import distillation_loss

from . import runs
from .conftest import SMALL, refused, write_folder
from .processes import context, start_ranks
from .runs import assert_same, run_until

pytest.importorskip("tyro")
pytest.importorskip("nvidia.dali")

# Everything random is on, so that the order, the pixels, the mixing and the erasing must all come out alike. 48 images
# in global batches of 8 are 6 steps an epoch, of which a third of the images is seen.
RECIPE = [
    *SMALL, *"--batch-size 8 --aa rand-m9-mstd0.5-inc1 --reprob 0.5 --mixup 0.8 --cutmix 1.0 --repeated-aug".split(),
    *"--hflip 0.5 --scale 0.3 1.0 --distillation-type hard --drop-path 0.1 --device cpu".split(),
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), train=16, val=4)


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A CNN fitted to the colours, so that its decisions differ between images."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    arguments = (
        "--input-size 32 --batch-size 12 --epochs 8 --lr 4e-3 --unscale-lr --no-pretrained --num-workers 1".split()
    )
    config = parse_config(
        [*arguments, "--model", "test_resnet", "--data-path", str(data), "--output-dir", str(folder)], recipe="teacher"
    )
    with join("cpu") as world:
        train.train(config, world)
    return folder


@pytest.fixture(scope="module")
def flags(data, teacher):
    return [*RECIPE, "--data-path", str(data), "--teacher-path", str(teacher)]


@pytest.fixture(scope="module")
def cache(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "four epochs"
    teach.store([*flags, "--views", "4", "--output", str(folder)])
    return folder


def losses(arguments, folder, monkeypatch):
    """(steps, 4): loss and terms of each step of 4 epochs."""
    found, compute = [], Objective.__call__

    def recorded(self, *inputs):
        loss, terms = compute(self, *inputs)
        found.append(torch.cat([loss.detach().view(1), terms]))
        return loss, terms

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", recorded)
        runs.run(*arguments, "--epochs", 4, "--output-dir", folder)
    return torch.stack(found)


def cached(flags, folder):
    """The flags with a logit cache in place of the teacher."""
    return [*without(flags, "--teacher-path"), "--teacher-store", str(folder)]


def without(arguments, flag):
    at = arguments.index(flag)
    return arguments[:at] + arguments[at + 2 :]


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


def loader_with_targets(config, folder, rank=0, world_size=1):
    return parts(config, folder, rank, world_size)[1]


def parts(config, folder, rank=0, world_size=1):
    """(cached teacher, loader with targets) of a run."""
    from fastdeit.data import loaders, open_images
    from fastdeit.distributed.world import World
    from fastdeit.models.deit import IMAGENET_MEAN, IMAGENET_STD

    alone = World(torch.device("cpu"))
    both = loaders(config, open_images(config, alone), World(torch.device("cpu"), rank, world_size), None)
    world = World(torch.device("cpu"), rank, world_size)
    teacher, (loader, _) = cached_teacher.from_cache(
        LogitCache(folder), config, world, both, IMAGENET_MEAN, IMAGENET_STD
    )
    return teacher, loader


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


def arrays(folder):
    return {name: np.array(array) for name, array in LogitCache(folder).arrays.items()}


def same(folder, other):
    assert arrays(folder).keys() == arrays(other).keys()
    for name, array in arrays(folder).items():
        assert np.array_equal(array, arrays(other)[name]), name


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
# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--seed", "1"], "recipe seed is 0 in the logit cache and 1 here"),
        (["--hflip", "0.4"], "recipe hflip is 0.5 in the logit cache and 0.4 here"),
        (["--input-size", "20"], "recipe input_size"),
        (["--batch-size", "4"], "recipe global_batch is 8 in the logit cache and 4 here"),
        (["--aa", "3aug"], "recipe aa"),
        (["--class-balance", "1"], "recipe class_balance is .* in the logit cache and 1.0 here"),
        (["--precision", "bf16"], 'precision is "float32" in the logit cache and "bfloat16" here'),
    ],
)
def test_another_recipe(flags, cache, change, words):
    with pytest.raises(UserError, match=words):
        loader_with_targets(parse_config([*flags, *change]), cache)


def test_other_data(flags, cache, tmp_path):
    data = write_folder(tmp_path / "data", train=15, val=4)
    with pytest.raises(UserError, match="data fingerprint"):
        loader_with_targets(parse_config([*flags, "--data-path", str(data)]), cache)


def changed(cache, tmp_path, change):
    """A copy of the cache with another header."""
    folder = tmp_path / "changed"
    shutil.copytree(cache, folder)
    header = logit_cache.read_header(folder)
    change(header)
    (folder / "header.json").write_text(json.dumps(header))
    return folder


def test_another_version_of_what_makes_the_pixels(flags, cache, tmp_path):
    folder = changed(cache, tmp_path, lambda header: header["pixels"].update({"nvidia-dali": "1.0"}))
    with pytest.raises(UserError, match=r'nvidia-dali is "1\.0" in the logit cache and "2'):
        loader_with_targets(parse_config(flags), folder)


def test_other_pixels_though_all_versions_agree(flags, cache, tmp_path):
    folder = changed(cache, tmp_path, lambda header: None)
    probe = np.load(folder / "probe.npy")
    probe[0, 0, 0, 0] += 1e-3
    np.save(folder / "probe.npy", probe)
    with pytest.raises(UserError, match="other pixels"):
        loader_with_targets(parse_config(flags), folder)


def test_an_image_that_could_be_read_then_and_not_now(flags, cache, tmp_path, data):
    folder = changed(cache, tmp_path, lambda header: None)
    indices = np.load(folder / "indices.npy", mmap_mode="r+")
    indices[0, 9] = (indices[0, 9] + 1) % 48
    indices.flush()
    loader = loader_with_targets(parse_config(flags), folder)
    loader.set_epoch(0)
    with pytest.raises(UserError, match=r"has the target of .*png where this run draws .*png"):
        list(loader)


def test_another_format(cache, tmp_path):
    folder = changed(cache, tmp_path, lambda header: header.update(format=0))
    with pytest.raises(UserError, match="format 0"):
        LogitCache(folder)


def test_a_folder_that_is_no_cache(tmp_path):
    with pytest.raises(UserError, match="is not a logit cache"):
        LogitCache(tmp_path)


def test_a_cache_started_with_other_settings_is_untouched(flags, cache, tmp_path):
    before = {path: path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}
    with pytest.raises(UserError, match="started with other settings: recipe seed is 0 in the logit cache and 5 here"):
        teach.store([*flags, "--seed", "5", "--views", "4", "--output", str(cache)])
    assert {path: path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()} == before


def test_a_refused_teacher_leaves_no_cache(flags, tmp_path, monkeypatch):
    """The corrected command (--teacher-precision, say) is not refused for a cache started before."""
    arguments = [*flags, "--views", "1", "--output", str(tmp_path / "cache")]
    with monkeypatch.context() as patch:
        patch.setattr("fastdeit.distill.teacher.Teacher.check", refuse)
        with pytest.raises(UserError, match="overflows"):
            teach.store(arguments)
    teach.store([*arguments, "--teacher-precision", "bf16"])
    assert LogitCache(tmp_path / "cache").header["teacher"]["precision"] == "bfloat16"


def refuse(*_):
    raise UserError("the teacher overflows")


def test_other_files_are_untouched(flags, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="contains other files"):
        teach.store([*flags, "--views", "2", "--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--views", "2"], "--output"),
        (["--views", "0", "--output", "x"], "--views 0"),
        (["--views", "1", "--output", "x", "--distillation-type", "none"], "hard or soft"),
        (["--views", "1", "--output", "x", "--teacher-store", "y"], "omit --teacher-store"),
    ],
)
def test_flags_that_cannot_be_meant(flags, arguments, words):
    with pytest.raises(UserError, match=words):
        teach.store([*without(flags, "--teacher-path"), *arguments])


def test_a_full_disk_says_so_and_loses_nothing(cache, tmp_path, monkeypatch):
    folder = changed(cache, tmp_path, lambda header: None)
    header = logit_cache.read_header(folder)
    rows = {"indices": np.zeros((6, 8)), "labels": np.zeros((6, 8))}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left"), join("cpu") as world:
        cache_writer._write(folder, header, [((0, 0, 6), rows)], 1, world)
    same(folder, cache)


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
