"""Stored answers: the same losses as with the teacher itself, whoever wrote them and however often it was killed."""

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
from fastdeit.distill.logit_cache import Store
from fastdeit.distributed.world import join
from fastdeit.errors import UserError
from fastdeit.kernels import distillation_loss

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
def stored(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "four views"
    cache_writer.store([*flags, "--views", "4", "--output", str(folder)])
    return folder


def losses(arguments, steps, folder):
    """(steps, 3): loss and its terms of each step of a run."""
    from fastdeit.training.trainer import Trainer

    found = []
    step = Trainer.step

    def recorded(self, batch):
        found.append(step(self, batch))
        return found[-1]

    Trainer.step = recorded
    try:
        config = parse_config([*arguments, "--epochs", "4", "--output-dir", str(folder)])
        with join("cpu") as world:
            train.train(config, world)
    finally:
        Trainer.step = step
    return torch.stack(found[:steps])


def without(arguments, flag):
    at = arguments.index(flag)
    return arguments[:at] + arguments[at + 2 :]


def test_training_from_a_store_has_the_losses_of_the_live_teacher(flags, stored, tmp_path):
    live = losses(flags, 20, tmp_path / "live")
    replayed = losses([*without(flags, "--teacher-path"), "--teacher-store", str(stored)], 20, tmp_path / "stored")
    assert len(live) == 20 and live.isfinite().all() and (live[:, 2] > 0).all()
    assert torch.equal(live, replayed)
    answers = np.asarray(Store(stored).arrays["labels"])
    assert (np.bincount(answers.ravel(), minlength=3) > 10).all(), "the teacher answers always the same"


def test_views_are_used_in_turn(flags, stored, tmp_path):
    config = parse_config([*without(flags, "--teacher-path"), "--teacher-store", str(stored)])
    loader = taught(config, stored)
    seen = []
    for epoch in (0, 1, 4, 5):
        loader.set_epoch(epoch)
        seen.append([(batch.indices.tolist(), batch.answers.tolist()) for batch in loader])
    assert seen[0] == seen[2] and seen[1] == seen[3] and seen[0] != seen[1]
    loader.set_epoch(5)
    loader.load_state_dict({"position": 4})
    assert [(batch.indices.tolist(), batch.answers.tolist()) for batch in loader] == seen[3][4:]
    assert len(loader) == 6 and loader.index.classes == ("blue", "green", "red")


def taught(config, folder, rank=0, world_size=1):
    return parts(config, folder, rank, world_size)[1]


def parts(config, folder, rank=0, world_size=1):
    """(stored teacher, taught loader) of a run."""
    from fastdeit.data import loaders, open_images
    from fastdeit.distributed.world import World
    from fastdeit.models.deit import IMAGENET_MEAN, IMAGENET_STD

    alone = World(torch.device("cpu"))
    both = loaders(config, open_images(config, alone), World(torch.device("cpu"), rank, world_size), None)
    world = World(torch.device("cpu"), rank, world_size)
    teacher, (loader, _) = cached_teacher.take(Store(folder), config, world, both, IMAGENET_MEAN, IMAGENET_STD)
    return teacher, loader


def test_two_readers_get_the_halves_of_each_batch(flags, stored):
    arguments = [*without(flags, "--teacher-path"), "--teacher-store", str(stored)]
    whole = [batch.answers for batch in taught(parse_config(arguments), stored)]
    half = parse_config([*arguments, "--batch-size", "4"])
    halves = [[batch.answers for batch in taught(half, stored, rank, 2)] for rank in (0, 1)]
    assert [torch.cat(pair).tolist() for pair in zip(*halves)] == [answers.tolist() for answers in whole]


def test_a_batch_in_parts_keeps_its_answers(flags, stored):
    batch = next(iter(taught(parse_config(flags), stored)))
    halves = split(batch, 2)
    assert torch.equal(torch.cat([half.answers for half in halves]), batch.answers) and len(halves[1].answers) == 4
    soft = batch._replace(answers=(batch.answers[:, None], torch.rand(8, 1)))
    assert torch.equal(torch.cat([half.answers[1] for half in split(soft, 4)]), soft.answers[1])


def test_images_without_labels_have_stored_answers_too(flags, data, tmp_path):
    """24 of them beside 48 with labels: 9 steps an epoch, in all of which the classes' term leaves them out."""
    more = write_folder(tmp_path / "more", train=6, val=2) / "train"
    arguments = [*flags, "--unlabelled-path", str(more)]
    cache_writer.store([*arguments, "--views", "2", "--output", str(tmp_path / "store")])
    store = Store(tmp_path / "store")
    assert (np.asarray(store.arrays["indices"]) >= 48).sum() > 10
    live = losses(arguments, 16, tmp_path / "live")
    replayed = losses([*without(arguments, "--teacher-path"), "--teacher-store", str(store.folder)], 16, tmp_path / "x")
    assert len(live) == 16 and live.isfinite().all() and torch.equal(live, replayed)
    with pytest.raises(UserError, match="data fingerprint"):
        taught(parse_config([*without(flags, "--teacher-path"), "--teacher-store", str(store.folder)]), store.folder)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, and kills


def storing(arguments, environment, kill_after):
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
        logit_cache.STEPS_AT_ONCE = 2
        os.pwrite = pwrite_and_die
    cache_writer.store(list(map(str, arguments)))


def start_storing(*arguments, kill_after=None, **environment):
    environment = {name: str(value) for name, value in environment.items()}
    process = context.Process(target=storing, args=(arguments, environment, kill_after))
    process.start()
    return process


def ended(process):
    process.join(120)
    return process.exitcode


def arrays(folder):
    return {name: np.array(array) for name, array in Store(folder).arrays.items()}


def same(folder, other):
    assert arrays(folder).keys() == arrays(other).keys()
    for name, array in arrays(folder).items():
        assert np.array_equal(array, arrays(other)[name]), name


def test_two_processes_write_the_same_store(flags, stored, tmp_path):
    arguments = [*flags, "--batch-size", 4, "--views", 4, "--output", tmp_path / "store"]
    ranks = [
        start_storing(*arguments, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for port in [free_port()]
        for rank in (0, 1)
    ]
    assert [ended(rank) for rank in ranks] == [0, 0]
    same(tmp_path / "store", stored)
    assert len(list((tmp_path / "store" / "written").iterdir())) == 2
    assert not Store(tmp_path / "store").damaged()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_processes_learn_from_it_as_from_the_live_teacher(flags, stored, tmp_path):
    arguments = [*flags, "--batch-size", "4", "--epochs", "4"]
    teachers = {"live": arguments, "stored": [*without(arguments, "--teacher-path"), "--teacher-store", str(stored)]}
    for name, given in teachers.items():
        (tmp_path / f"logs {name}").mkdir()
        ranks = start_ranks(2, *given, "--output-dir", tmp_path / name, logs=tmp_path / f"logs {name}")
        assert [rank.wait(120) for rank in ranks] == [0, 0], ranks[0].text
    assert_same(tmp_path / "live", tmp_path / "stored")


def test_a_killed_run_goes_on_where_it_stopped(flags, stored, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "store"
    arguments = [*flags, "--views", "4", "--output", str(folder)]
    for kill_after in (9, 6):
        assert ended(start_storing(*arguments, kill_after=kill_after)) == -signal.SIGKILL
        with pytest.raises(UserError, match="not complete"):
            Store(folder)
    monkeypatch.setattr(logit_cache, "STEPS_AT_ONCE", 2)
    header = logit_cache.read_header(folder)
    # Each piece is 2 steps of 2 arrays, so 4 writes: 2 and then 1 pieces were written whole before the kills.
    left = logit_cache.missing(folder, header)
    assert left == logit_cache.pieces_of(header)[3:]
    with (folder / "written" / "rank-00000.jsonl").open("ab") as file:
        file.write(b'{"piece": [0, 4')  # a line that a kill cut short
    answered = []
    rows = cache_writer.LiveAnswers.rows
    monkeypatch.setattr(
        cache_writer.LiveAnswers, "rows", lambda self, batches: answered.append(1) or rows(self, batches)
    )
    cache_writer.store(arguments)
    assert len(answered) == len(left)
    same(folder, stored)
    assert not Store(folder).damaged()


# ---------------------------------------------------------------------------------------------------------------------
# What is in it


def test_soft_answers_keep_the_likeliest_classes(flags, tmp_path):
    arguments = [*flags, "--distillation-type", "soft", "--distillation-tau", "2"]
    cache_writer.store([*arguments, "--views", "1", "--top", "2", "--output", str(tmp_path / "store")])
    store = Store(tmp_path / "store")
    assert {name: (str(array.dtype), array.shape) for name, array in store.arrays.items()} == {
        "indices": ("int32", (1, 48)), "classes": ("int16", (1, 48, 2)), "probabilities": ("float16", (1, 48, 2)),
    }  # fmt: skip
    config = parse_config([*without(arguments, "--teacher-path"), "--teacher-store", str(tmp_path / "store")])
    loader = taught(config, tmp_path / "store")
    with join("cpu") as world:
        live = cache_writer.LiveAnswers(parse_config(arguments), world, loader.index.classes, 2)
        batch = next(iter(loader))
        logits = live.teacher(live.prepare(batch))
    expected = (logits / 2).softmax(1)
    classes, probabilities = batch.answers
    torch.testing.assert_close(expected.gather(1, classes), probabilities, atol=1e-3, rtol=1e-3)
    assert torch.equal(classes[:, 0], expected.argmax(1))
    student = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    settings = {"kind": "soft", "tau": 2.0, "alpha": 1.0}
    stored_loss = distillation_loss(student, student, batch.labels, batch.answers, **settings)
    live_loss = distillation_loss(student, student, batch.labels, logits, **settings)
    assert stored_loss.item() == pytest.approx(live_loss.item(), abs=2e-3)
    with pytest.raises(UserError, match=r"tau is 2\.0 in the store and 3\.0 here"):
        taught(parse_config([*arguments, "--distillation-tau", "3"]), tmp_path / "store")
    with pytest.raises(UserError, match='kind is "soft" in the store and "hard" here'):
        taught(parse_config([*arguments, "--distillation-type", "hard"]), tmp_path / "store")


def test_decisions_among_equals_are_the_first():
    logits = torch.tensor([[1.0, 3, 3, 2], [5, 5, 5, 5], [0, 1, 2, 3]])
    assert cache_writer.first_argmax(logits).tolist() == [1, 0, 3]


def test_many_classes_take_four_bytes():
    assert logit_cache.label_dtype(32768) == "int16" and logit_cache.label_dtype(32769) == "int32"


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--seed", "1"], "recipe seed is 0 in the store and 1 here"),
        (["--hflip", "0.4"], "recipe hflip is 0.5 in the store and 0.4 here"),
        (["--input-size", "20"], "recipe input_size"),
        (["--batch-size", "4"], "recipe global_batch is 8 in the store and 4 here"),
        (["--aa", "3aug"], "recipe aa"),
        (["--precision", "bf16"], 'precision is "float32" in the store and "bfloat16" here'),
    ],
)
def test_another_recipe(flags, stored, change, words):
    with pytest.raises(UserError, match=words):
        taught(parse_config([*flags, *change]), stored)


def test_other_data(flags, stored, tmp_path):
    data = write_folder(tmp_path / "data", train=15, val=4)
    with pytest.raises(UserError, match="data fingerprint"):
        taught(parse_config([*flags, "--data-path", str(data)]), stored)


def changed(stored, tmp_path, change):
    """A copy of the store with another header."""
    folder = tmp_path / "changed"
    shutil.copytree(stored, folder)
    header = logit_cache.read_header(folder)
    change(header)
    (folder / "header.json").write_text(json.dumps(header))
    return folder


def test_another_version_of_what_makes_the_pixels(flags, stored, tmp_path):
    folder = changed(stored, tmp_path, lambda header: header["pixels"].update({"nvidia-dali": "1.0"}))
    with pytest.raises(UserError, match=r'nvidia-dali is "1\.0" in the store and "2'):
        taught(parse_config(flags), folder)


def test_other_pixels_though_all_versions_agree(flags, stored, tmp_path):
    folder = changed(stored, tmp_path, lambda header: None)
    probe = np.load(folder / "probe.npy")
    probe[0, 0, 0, 0] += 1e-3
    np.save(folder / "probe.npy", probe)
    with pytest.raises(UserError, match="other pixels"):
        taught(parse_config(flags), folder)


def test_an_image_that_could_be_read_then_and_not_now(flags, stored, tmp_path, data):
    folder = changed(stored, tmp_path, lambda header: None)
    indices = np.load(folder / "indices.npy", mmap_mode="r+")
    indices[0, 9] = (indices[0, 9] + 1) % 48
    indices.flush()
    loader = taught(parse_config(flags), folder)
    loader.set_epoch(0)
    with pytest.raises(UserError, match=r"has the answer to .*png where this run draws .*png"):
        list(loader)


def test_another_format(stored, tmp_path):
    folder = changed(stored, tmp_path, lambda header: header.update(format=0))
    with pytest.raises(UserError, match="format 0"):
        Store(folder)


def test_what_is_no_store(tmp_path):
    with pytest.raises(UserError, match="no store"):
        Store(tmp_path)


def test_a_store_begun_otherwise_is_left_alone(flags, stored, tmp_path):
    before = {path: path.read_bytes() for path in sorted(stored.rglob("*")) if path.is_file()}
    with pytest.raises(UserError, match="begun otherwise: recipe seed is 0 in the store and 5 here"):
        cache_writer.store([*flags, "--seed", "5", "--views", "4", "--output", str(stored)])
    assert {path: path.read_bytes() for path in sorted(stored.rglob("*")) if path.is_file()} == before


def test_a_refused_teacher_is_in_nobodys_way(flags, tmp_path, monkeypatch):
    """The same command with the mistake put right (--teacher-precision, say) is not told that a store was begun."""
    arguments = [*flags, "--views", "1", "--output", str(tmp_path / "store")]
    with monkeypatch.context() as patch:
        patch.setattr("fastdeit.distill.teacher.Teacher.check", refuse)
        with pytest.raises(UserError, match="overflows"):
            cache_writer.store(arguments)
    cache_writer.store([*arguments, "--teacher-precision", "bf16"])
    assert Store(tmp_path / "store").header["teacher"]["precision"] == "bfloat16"


def refuse(*_):
    raise UserError("the teacher overflows")


def test_other_files_are_left_alone(flags, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds other files"):
        cache_writer.store([*flags, "--views", "2", "--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--views", "2"], "--output"),
        (["--views", "0", "--output", "x"], "--views 0"),
        (["--views", "1", "--output", "x", "--distillation-type", "none"], "hard or soft"),
        (["--views", "1", "--output", "x", "--teacher-store", "y"], "leave --teacher-store away"),
    ],
)
def test_flags_that_cannot_be_meant(flags, arguments, words):
    with pytest.raises(UserError, match=words):
        cache_writer.store([*without(flags, "--teacher-path"), *arguments])


def test_a_full_disk_says_so_and_loses_nothing(stored, tmp_path, monkeypatch):
    folder = changed(stored, tmp_path, lambda header: None)
    header = logit_cache.read_header(folder)
    rows = {"indices": np.zeros((6, 8)), "labels": np.zeros((6, 8))}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"cannot be written to \(No space left"), join("cpu") as world:
        cache_writer._write(folder, header, [((0, 0, 6), rows)], 1, world)
    same(folder, stored)


# ---------------------------------------------------------------------------------------------------------------------
# Looking at it again


def test_verify_agrees(stored, cli):
    code, out, err = cli(teach.main, "verify", stored, "--batches", "3", "--device", "cpu")
    assert code == 0, err
    assert "checksums agree" in out and "of 24 images asked again the teacher decides as stored on 100.00 %" in out


def test_verify_is_one_process_and_asks_something(stored, cli, monkeypatch):
    refused(cli, teach.main, "verify", stored, "--batches", "0", words=["--batches 0"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(cli, teach.main, "verify", stored, words=["one process"])


def test_verify_finds_damage(stored, tmp_path, cli):
    folder = changed(stored, tmp_path, lambda header: None)
    with (folder / "labels.npy").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    code, _, err = cli(teach.main, "verify", folder, "--device", "cpu")
    assert code == 2 and "checksums differ at view 3" in err


def test_verify_finds_another_teacher(stored, flags, tmp_path, cli):
    folder = tmp_path / "other"
    shutil.copytree(Path(flags[flags.index("--teacher-path") + 1]), folder, symlinks=True)
    weights = next((folder / "last").glob("model.safetensors")).resolve()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, err = cli(teach.main, "verify", stored, "--teacher-path", folder, "--device", "cpu")
    assert code == 2 and "teacher" in err and "weights" in err


def test_a_teacher_that_moved_is_the_same(stored, flags, tmp_path, cli):
    folder = tmp_path / "moved"
    shutil.copytree(Path(flags[flags.index("--teacher-path") + 1]), folder, symlinks=True)
    code, out, err = cli(teach.main, "verify", stored, "--teacher-path", folder, "--device", "cpu", "--batches", "1")
    assert code == 0 and "100.00 %" in out, err
    cache_writer.store([*flags, "--teacher-path", str(folder), "--views", "4", "--output", str(stored)])


def test_a_run_goes_on_from_a_store_that_moved(flags, stored, teacher, tmp_path, monkeypatch, cli):
    arguments = [*without(flags, "--teacher-path"), "--teacher-store", stored, "--output-dir", tmp_path / "run"]
    run_until(monkeypatch, 2, *arguments)
    shutil.copytree(stored, tmp_path / "moved")
    other = changed(stored, tmp_path, lambda header: header["teacher"].update(weights="00"))
    words = ["not the one the run was started with", "--teacher-store"]
    refused(cli, train.main, "--resume", tmp_path / "run", "--teacher-store", other, words=words)
    code, out, err = cli(train.main, "--resume", tmp_path / "run", "--teacher-store", tmp_path / "moved")
    assert code == 0 and "going on at step 3" in out, err


def test_a_teacher_beside_its_store(cli, flags, stored):
    refused(
        cli, train.main, *flags, "--teacher-store", stored, words=["--teacher-path and --teacher-store", "give one"]
    )


def test_the_run_says_how_often_a_view_is_used(flags, stored):
    arguments = [*without(flags, "--teacher-path"), "--teacher-store", str(stored), "--epochs", "9"]
    sentences = parts(parse_config(arguments), stored)[0].check([])
    assert "up to 3 times" in sentences[1] and "4 views of 48 images, hard" in sentences[0]
    assert len(parts(parse_config([*arguments, "--epochs", "4"]), stored)[0].check([])) == 1


@pytest.mark.gpu
def test_on_a_gpu_the_same_answers_come_again(flags, tmp_path, cli):
    arguments = [*flags, "--device", "cuda", "--views", "2", "--output", str(tmp_path / "store")]
    cache_writer.store(arguments)
    code, out, err = cli(teach.main, "verify", tmp_path / "store", "--batches", "6", "--device", "cuda")
    assert code == 0, out + err
