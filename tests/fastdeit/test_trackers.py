"""Trackers: what they are given, by fakes of wandb and trackio with the signatures of wandb 0.31 and trackio 0.43, and
by TensorBoard itself."""

import importlib.machinery
import json
import sys
import time
import types

import pytest

from fastdeit.errors import UserError
from fastdeit.training import trackers
from fastdeit.training.log import Log

SETTINGS = {"run": {"seed": 0}}


class FakeRun:
    def __init__(self):
        self.logged, self.finished, self.metrics = [], False, []

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, data, step=None):
        self.logged.append((data, step))

    def finish(self):
        self.finished = True


@pytest.fixture
def fake(monkeypatch):
    """Install a module of this name whose init notes its arguments and returns a FakeRun."""

    def install(name):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=f"{name}/__init__.py")
        module.calls, module.runs = [], []

        def init(**arguments):
            module.calls.append(arguments)
            module.runs.append(FakeRun())
            return module.runs[-1]

        module.init = init
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "runs" / "cats"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_in_the_same_record(name, fake, folder, monkeypatch):
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "zoo")
    module = fake(name)
    for step in (50, 30):  # as after a resume from step 20
        tracker = trackers.open_tracker(name, folder, SETTINGS)
        tracker.log(step, {"train/loss": 0.5})
        tracker.close()
    first, second = module.calls
    assert first == second and first["project"] == "zoo" and first["resume"] == "allow" and first["config"] == SETTINGS
    identity = (folder / "tracker_id").read_text().strip()
    assert identity in (first["id"] if name == "wandb" else first["name"]) and "runs-cats" in first["name"]
    assert [run.finished for run in module.runs] == [True, True]
    if name == "wandb":
        assert [run.logged for run in module.runs] == [[({"train/loss": 0.5, "step": n}, None)] for n in (50, 30)]
        assert module.runs[0].metrics == [("*", "step")]
    else:
        assert [run.logged for run in module.runs] == [[({"train/loss": 0.5}, n)] for n in (50, 30)]


def test_tensorboard_is_what_a_run_gets_unasked(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ((10, 20, 30), (20, 30)):
        tracker = trackers.open_tracker(None, folder, SETTINGS)
        for step in steps:
            tracker.log(step, {"train/loss": 1 / step / len(steps)})
        tracker.close()
        time.sleep(1.1)  # seconds in their names tell the two files' order
    events = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("train/loss")
    assert {event.step: event.value for event in events} == pytest.approx({10: 1 / 30, 20: 1 / 40, 30: 1 / 60})


def test_none_is_none(folder):
    assert trackers.open_tracker("none", folder, SETTINGS) is None
    assert list(folder.iterdir()) == []


def test_one_that_is_not_installed_is_refused_before_the_run(tmp_path, monkeypatch, cli):
    from fastdeit import train

    monkeypatch.chdir(tmp_path)
    (tmp_path / "trackio").mkdir()  # a folder of that name is no package
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    if trackers._installed("trackio"):
        pytest.skip("trackio is installed here")
    code, _, err = cli(train.main, "--tracker", "trackio", "--output-dir", tmp_path / "run")
    assert code == 2 and "pip install trackio" in err and not (tmp_path / "run").exists()


def test_one_that_does_not_start_is_refused_in_a_sentence(fake, folder):
    def init(**arguments):
        raise RuntimeError("api_key not configured")

    fake("wandb").init = init
    with pytest.raises(UserError, match=r"--tracker wandb does not start \(api_key not configured\)"):
        trackers.open_tracker("wandb", folder, SETTINGS)


class Broken:
    def log(self, step, figures):
        raise ConnectionError("gone")

    def close(self):
        raise AssertionError("a tracker that failed is left alone")


def test_training_survives_a_tracker_that_fails(folder, capfd):
    log = Log(folder, total_steps=2, title="", tracker=Broken())
    figures = {"loss": 1.0, "class_loss": 1.0, "teacher_loss": 0.0, "lr": 0.1, "images_per_s": 9.0, "data_share": 0.0}
    for step in (1, 2):
        log.train(step=step, epoch=0, **figures)
    log.close()
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert capfd.readouterr().out.count("tracking has stopped") == 1


def test_nested_figures_get_one_name_each(fake, folder):
    tracker = trackers.open_tracker("wandb", folder, SETTINGS) if fake("wandb") else None
    log = Log(folder, total_steps=1, title="", tracker=tracker)
    log.evaluated(step=1, epoch=0, epochs=1, figures={}, seconds=2.0, accuracy={"ema": {"both": 0.25}})
    assert tracker.run.logged == [
        ({"eval/epoch": 0, "eval/seconds/evaluation": 2.0, "eval/ema/both": 0.25, "step": 1}, None)
    ]
