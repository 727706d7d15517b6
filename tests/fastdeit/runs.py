"""Short runs for the tests: started, stopped at a chosen step, resumed, and compared bit by bit."""

import json
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from fastdeit import train
from fastdeit.cli import parse_config
from fastdeit.distributed import signals
from fastdeit.distributed.world import join

# Everything random is on: views, mixing, erasing, dropped paths. Three steps an epoch on the colours.
RANDOM = (
    "--recipe demo --input-size 16 --batch-size 12 --epochs 3 --warmup-epochs 1 --num-workers 1 --device cpu "
    "--distillation-type none --no-compare-undistilled --tracker none --lr 1e-3 --unscale-lr --clip-grad 1 "
    "--drop-path 0.2 --mixup 0.8 --cutmix 1 --reprob 0.25 --aa rand-m9-mstd0.5-inc1 --repeated-aug --hflip 0.5"
).split()


def run(*arguments, on_micro_batch=None):
    """A whole run in this process, as the command makes it, without the pictures. Returns the closing table."""
    pytest.importorskip("tyro")
    pytest.importorskip("nvidia.dali")
    config = parse_config([str(argument) for argument in arguments])
    no_pictures = {name: lambda *_: None for name in ("first_batch", "curves", "token_similarity")}
    with mock.patch.multiple("fastdeit.evaluation.plots", **no_pictures), join(config.run.device) as world:
        return train.train(config, world, on_micro_batch)


def run_until(monkeypatch, step, *arguments, part=0, signal=signals.signal.SIGTERM, late=0):
    """The same, but the signal comes while `part` of the batch of `step` (counted from 0) is on its way. On a GPU up to
    two steps more are made: `late`."""
    parts_seen = []

    def be_told(trainer):
        parts_seen.append(trainer.state.step)
        if trainer.state.step == step and parts_seen.count(step) == part + 1:
            trainer.world.stop.received = signal

    with monkeypatch.context() as patch:
        patch.setattr(signals.Stop, "leave", leave)
        with pytest.raises(SystemExit) as stop:
            run(*arguments, on_micro_batch=be_told)
    assert stop.value.code == 128 + signal
    assert step <= max(parts_seen) <= step + late  # the step was finished, and no further one begun


def leave(self, number=None):
    """Stop.leave without the end of the process."""
    self.before_exit()
    raise SystemExit(128 + (self.received or number))


def assert_same(one, other, *, exact=True):
    """Two runs ended in the same weights, moving average, optimizer and lines of the log."""
    compare = torch.equal if exact else lambda a, b: torch.allclose(a, b, rtol=1e-3, atol=1e-5)
    for name in ("model", "ema"):
        left, right = (load_file(folder / "last" / f"{name}.safetensors") for folder in (one, other))
        assert left.keys() == right.keys()
        assert all(compare(left[key], right[key]) for key in left), name
    states = [
        torch.load(folder / "last" / "training.pt", weights_only=True)["optimizer"]["state"] for folder in (one, other)
    ]
    assert states[0].keys() == states[1].keys()
    for number, values in states[0].items():
        assert all(compare(value, states[1][number][key]) for key, value in values.items())
    if exact:
        assert lines(one) == lines(other)
    else:
        assert_same_losses(one, other)


def assert_same_losses(one, other):
    """To fp32 rounding."""
    for left, right in zip(lines(one), lines(other), strict=True):
        assert left.keys() == right.keys()
        if left["kind"] == "train":
            assert [left[key] for key in LOSSES] == pytest.approx([right[key] for key in LOSSES], rel=1e-4)


LOSSES = ("loss", "class_loss", "teacher_loss", "attention_loss", "feature_loss")


def lines(folder):
    """metrics.jsonl without what a clock says."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: record[key] for key in record.keys() - {"images_per_s", "data_share", "seconds", "time"}}
        for record in records
    ]


def step_of(folder):
    return json.loads((folder / "last" / "config.json").read_text())["step"]
