"""Checkpoints are whole or not there: after a kill at any instant, a power cut, a full disk, a forged file."""

import os
import pickle
import random
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from fastdeit.checkpoint import atomic, files
from fastdeit.checkpoint.async_writer import AsyncWriter, Snapshot
from fastdeit.errors import UserError
from fastdeit.training.log import Log

from .processes import At, Child
from .runs import RANDOM, assert_same, run, step_of


def write(run, step, **options):
    """A small checkpoint whose every part tells the step."""
    weights = {"weight": torch.full((64,), float(step))}
    return files.save(
        run, {"progress": {"step": step}}, step=step, model=weights, ema=weights, training={"step": step}, **options
    )


def check(run) -> int:
    """`last` leads to a whole checkpoint; its step."""
    saved = files.read(run / "last")
    step = saved["description"]["step"]
    assert saved["training"] == {"step": step}
    for part in ("model", "ema"):
        assert torch.equal(saved[part]["weight"], torch.full((64,), float(step)))
    return step


# ---------------------------------------------------------------------------------------------------------------------
# Kills and power cuts, at each instant in turn


class Killed(BaseException):
    """Not an Exception: no clean-up runs."""


CALLS = ("fsync", "mkdir", "rename", "replace", "symlink", "unlink", "rmdir")
sees_pathlib = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="Python 3.10's pathlib keeps functions of os: patching os changes nothing there"
)


class Kill:
    """Count the calls that change the disk, and die before the n-th one."""

    def __init__(self, patch, at):
        self.at, self.calls, self.flushed = at, [], set()
        for name in CALLS:
            patch.setattr(os, name, self._counting(name, getattr(os, name)))

    def _counting(self, name, call):
        def counted(*args, **kwargs):
            self.calls.append(name)
            if len(self.calls) == self.at:
                raise Killed
            if name == "fsync":
                self.flushed.add(os.fstat(args[0]).st_ino)
            return call(*args, **kwargs)

        return counted


def save_and_die(run, at, step, **options):
    """Whether `write` was killed, and the inodes it had flushed."""
    with pytest.MonkeyPatch.context() as patch:
        kill = Kill(patch, at)
        try:
            write(run, step, **options)
        except Killed:
            return True, kill.flushed
    return False, kill.flushed


@sees_pathlib
@pytest.mark.parametrize("power_cut", [False, True])
def test_a_kill_at_any_instant(tmp_path, power_cut):
    write(tmp_path, 1, best=True)
    flushed = {path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()}
    step, instant, killed, seen = 2, 1, True, set()
    while killed:
        killed, now_flushed = save_and_die(
            tmp_path, instant, step, best=step % 3 == 0, keep=step % 2 == 0, keep_count=2
        )
        flushed |= now_flushed
        if power_cut:  # what was not flushed has no content
            for path in tmp_path.rglob("*"):
                if path.is_file() and path.stat().st_ino not in flushed:
                    path.write_bytes(b"")
        reached = check(tmp_path)
        assert reached in (step, step - 1)
        seen.add(reached - step)
        files.read(tmp_path / "best")
        # As a resumed run does: clear up, go on from there.
        files.sweep(tmp_path)
        folder, _ = files.read_newest(tmp_path, pytest.fail)
        atomic.point(tmp_path / "last", folder)
        flushed |= {path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()}
        step, instant = check(tmp_path) + 1, instant + 1
        assert not list(tmp_path.rglob("*.unfinished"))
    assert seen == {0, -1} and instant > 15


@sees_pathlib
def test_what_is_on_the_disk_before_what(tmp_path):
    """The new checkpoint and its name are flushed before `last` moves, and that before the old one goes."""
    write(tmp_path, 1)
    order = []
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, noting(order, name, getattr(os, name)))
        write(tmp_path, 2)
    folders = "step-00000002.unfinished"
    events = [event for event in order if event[0] in ("fsync", "rename", "replace", "unlink")]
    renamed, moved = events.index(("rename", folders)), events.index(("replace", "last.unfinished"))
    flushed = {name for call, name in events[:renamed] if call == "fsync"}
    assert {
        "model.safetensors",
        "ema.safetensors",
        "training.pt",
        f"config.json.{os.getpid()}.unfinished",
        folders,
    } <= flushed
    assert ("fsync", "checkpoints") in events[renamed:moved]
    old = events.index(("rename", "step-00000001"))
    assert ("fsync", tmp_path.name) in events[moved:old]


def noting(order, name, call):
    def noted(*args, **kwargs):
        order.append((name, _place(args[0])))
        return call(*args, **kwargs)

    return noted


def _place(what) -> str:
    return Path(os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else what).name


# ---------------------------------------------------------------------------------------------------------------------
# Retention, descriptions, damage


def steps(run):
    return [int(folder.name[5:]) for folder in sorted((run / "checkpoints").iterdir())]


def test_retention(tmp_path):
    for step in range(1, 8):
        write(tmp_path, step, best=step == 3, keep=step % 2 == 0)
    assert steps(tmp_path) == [2, 3, 4, 6, 7]
    write(tmp_path, 8, keep=True, keep_count=2)
    assert steps(tmp_path) == [3, 4, 6, 8]  # 3 is the best, 8 the last, 4 and 6 are kept
    write(tmp_path, 9, best=True, keep_count=1)
    assert steps(tmp_path) == [8, 9]


def test_retention_of_a_run(colors, tmp_path):
    folder = tmp_path / "run"
    run(*RANDOM, "--data-path", colors, "--output-dir", folder, "--epochs", 5, "--keep-epochs", 2)
    best = int((folder / "best").resolve().name[5:])
    assert steps(folder) == sorted({6, 12, 15, best})


def test_an_addition_to_the_description(tmp_path):
    write(tmp_path, 1, best=True)
    write(tmp_path, 2)
    files.note(tmp_path, 2, {"accuracy": 0.5}, best=True)
    assert files.description(tmp_path / "best") == {
        "progress": {"step": 2},
        "step": 2,
        "keep": False,
        "accuracy": 0.5,
    }
    assert steps(tmp_path) == [2]


def test_files_are_readable_for_others(tmp_path):
    former = os.umask(0o022)
    try:
        folder = write(tmp_path, 1)
    finally:
        os.umask(former)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "training.pt", "config.json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, file):
    write(tmp_path, 1, best=True)
    folder = write(tmp_path, 2)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    said = []
    found, saved = files.read_newest(tmp_path, said.append)
    assert saved["description"]["step"] == 1 and "step-00000002" in said[0] and "the one before" in said[0]
    (found / file).write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint"):
        files.read_newest(tmp_path, said.append)


class Forged:
    def __reduce__(self):
        return os.system, ("touch forged",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_with_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path, 1)
    torch.save({"optimizer": Forged()}, folder / "training.pt")
    with pytest.raises(UserError, match="holds code"):
        files.read(folder)
    (folder / "training.pt").write_bytes(pickle.dumps(Forged()))
    with pytest.raises(UserError, match="refused"):
        files.read(folder)
    assert not (tmp_path / "forged").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The thread that writes


def test_a_snapshot_is_of_its_moment():
    tree = {"a": [torch.zeros(3), {"b": torch.ones(2, dtype=torch.int64)}], "n": 7}
    snapshot = Snapshot()
    copy = snapshot.take(tree)
    tree["a"][0].fill_(5)
    assert copy["a"][0].tolist() == [0, 0, 0] and copy["a"][1]["b"].tolist() == [1, 1] and copy["n"] == 7
    memory = copy["a"][0].data_ptr()
    assert snapshot.take(tree)["a"][0].data_ptr() == memory  # used again
    assert snapshot.take(tree, here=False) is None


def test_writing_does_not_hold_up_the_caller(tmp_path, monkeypatch):
    written = files.save
    monkeypatch.setattr(files, "save", lambda *args, **kwargs: (time.sleep(0.5), written(*args, **kwargs)))
    saver = AsyncWriter(tmp_path, pytest.fail)
    weights = {"weight": torch.zeros(64)}
    since = time.monotonic()
    saver.save({"model": weights, "ema": weights, "training": {"step": 0}}, {}, step=0, keep=False)
    assert time.monotonic() - since < 0.3
    weights["weight"].fill_(9)
    saver.close()
    assert check(tmp_path) == 0


# ---------------------------------------------------------------------------------------------------------------------
# A full disk


@pytest.fixture
def tiny(tmp_path):
    """A file system that holds one checkpoint of the nano student and not two."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=28m", "tmpfs", folder]).returncode:
        pytest.skip("only root mounts file systems")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(path):
    """Not a byte is left."""
    with path.open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_a_full_disk(tiny, colors, tmp_path):
    straight = tmp_path / "straight"
    run(*RANDOM, "--data-path", colors, "--output-dir", straight)
    command = [*RANDOM, "--data-path", colors, "--output-dir", tiny / "run"]
    child = Child(*command, log=tmp_path / "log.txt", on_micro_batch=At(4, partial(fill, tiny / "filler")))
    assert child.wait() == 2, child.text
    assert "could not be written" in child.text and "No space left" in child.text and "training continues" in child.text
    error = child.text.splitlines()[-1]
    assert error.startswith("error: ") and "make room" in error and "--resume" in error
    assert step_of(tiny / "run") == 3 and not list(tiny.rglob("*.unfinished"))
    files.read(tiny / "run" / "last")
    (tiny / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=100m", tiny], check=True)
    run("--resume", tiny / "run")
    assert_same(straight, tiny / "run")


def test_a_line_of_metrics_that_cannot_be_written(tmp_path, capfd):
    log = Log(tmp_path, total_steps=2, title="student")
    log.lines = open("/dev/full", "a", buffering=1)
    figures = {"loss": 1.0, "lr": 1e-3, "images_per_s": 1.0, "data_share": 0.0}
    for step in (1, 2):
        log.train(step=step, epoch=0, **figures)
    log.close()
    assert capfd.readouterr().out.count("metrics.jsonl cannot be written (No space left on device)") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Kill -9 at random instants of real runs


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.soak)])
def test_kills_at_random_instants(colors, tmp_path, kills):
    """A checkpoint after every step, so that most kills hit the writing of one; it ends in the same weights."""
    seed = int(os.environ.get("FASTDEIT_SOAK_SEED", 0))
    chance = random.Random(seed)
    command = [*RANDOM, "--data-path", colors, "--epochs", 4 + kills, "--checkpoint-minutes", 0]
    run(*command, "--output-dir", tmp_path / "straight")
    folder, killed_after = tmp_path / "run", []
    while len(killed_after) < kills:
        child = Child(*command, "--output-dir", folder, "--resume", "auto", log=tmp_path / "log.txt")
        wanted = reached(folder) + chance.randint(0, 3)
        while reached(folder) < wanted and child.process.is_alive():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        child.kill()
        assert child.wait() == 128 + 9, child.text
        killed_after.append(reached(folder))
        if killed_after[-1]:
            files.read(folder / "last")
    child = Child(*command, "--output-dir", folder, "--resume", "auto", log=tmp_path / "log.txt")
    assert child.wait() == 0, child.text
    print(f"seed {seed}: killed after the checkpoints of steps {killed_after}")
    assert_same(tmp_path / "straight", folder)
    summaries = [(run / "summary.json").read_text() for run in (folder, tmp_path / "straight")]
    assert summaries[0] == summaries[1]


def reached(folder) -> int:
    return int((folder / "last").resolve().name[5:]) if (folder / "last").exists() else 0


def test_the_thread_waits_for_the_gpu_of_the_tensors_not_for_the_first(monkeypatch):
    """cuda:1, which is not here: what PyTorch is asked for is written down."""
    asked = []

    class On1(torch.Tensor):
        is_cuda, device = True, torch.device("cuda", 1)

    class Event:
        def record(self, stream):
            asked.append(f"recorded on {stream}")

        def synchronize(self):
            asked.append("waited")

    @contextmanager
    def device(which):
        asked.append(f"enter {which}")
        yield
        asked.append("leave")

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **options: empty(*size, **options))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    snapshot = Snapshot()
    snapshot.take({"a": torch.zeros(2)})
    snapshot.wait()
    assert asked == []  # nothing is on a GPU, so none is touched
    snapshot.take({"a": torch.zeros(2).as_subclass(On1)})
    snapshot.wait()
    assert asked == ["recorded on the stream of cuda:1", "enter cuda:1", "waited", "leave"]
