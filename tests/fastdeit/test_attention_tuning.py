"""What is asked about a DeiT's attention, norms and activations; that it then computes with the answers."""

import copy
import dataclasses

import pytest
import torch

from fastdeit.config import Config
from fastdeit.distributed.world import World
from fastdeit.kernels.attention import tiles
from fastdeit.models.deit import create_model
from fastdeit.models.implementation import Implementation
from fastdeit.training import student_tuning
from fastdeit.tuning import Tuner, choose

NANO = "deit_nano_distilled_patch4_16"
TILES = ("tiles of fused attention, forward", "tiles of fused attention, backward")


@pytest.fixture
def config():
    config = Config()
    config.model.model, config.data.batch_size = NANO, 2
    config.speed.precision, config.speed.compile = "bf16", False
    return config


@pytest.fixture
def model():
    return create_model(NANO, num_classes=5, drop_path=0.2)


@pytest.fixture
def on_gpu(monkeypatch):
    """The questions that a GPU is asked; here our operations answer in plain PyTorch."""
    monkeypatch.setattr(student_tuning, "use_triton", lambda x: True)
    monkeypatch.setattr(tiles, "_forward", {})
    monkeypatch.setattr(tiles, "_backward", {})


def tuner(tmp_path, **options):
    return Tuner(World(torch.device("cpu")), mode="fresh", file=tmp_path / "cache.json", **options)


def preferring(monkeypatch, *names):
    """The clock likes these best, the earlier the better."""

    def in_turns(calls, device, cold):
        for call in calls.values():
            call()
        return {name: float(names.index(name) + 1 if name in names else 100) for name in calls}

    monkeypatch.setattr(choose.timing, "in_turns", in_turns)


def ask(tuner, model, config):
    """The questions of this file alone."""
    arrangement = student_tuning.Arrangement.default(tuner.world.device)
    for question in (student_tuning.kernel_tiles, student_tuning.attention, student_tuning.fusions):
        question(tuner, model, config, arrangement)


def asked(tuner):
    return {choice.question: choice for choice in tuner.choices}


def test_on_a_cpu_it_is_timed(tmp_path, config, model):
    timed = tuner(tmp_path)
    ask(timed, model, config)
    assert list(asked(timed)) == ["attention", "attention of the last block"]
    for choice in timed.choices:
        assert [row.candidate for row in choice.rows] == ["sdpa", "math"] and choice.origin == "measured"
        assert all(row.ms > 0 and row.error is not None for row in choice.rows)
    answers = (timed.choices[0].chosen, timed.choices[1].chosen)
    assert model.implementation == Implementation(*answers)


def test_the_model_takes_the_answers(tmp_path, config, model, monkeypatch):
    names = list(model.state_dict())
    preferring(monkeypatch, "math")
    ask(tuner(tmp_path), model, config)
    assert model.implementation == Implementation("math", "math")
    assert copy.deepcopy(model).blocks[3].attn.attend is model.blocks[0].attn.attend  # the moving average's too
    assert list(model.state_dict()) == names


def test_on_a_gpu_tiles_and_fusions_too(tmp_path, config, model, monkeypatch, on_gpu):
    shape = tiles.Shape(90, 18, 18, 32, torch.bfloat16)
    forward, backward = tiles.forward_candidates(shape), tiles.backward_candidates(shape, 8)
    wanted = [list(forward)[2], list(backward)[2], "math", "ours"]
    preferring(monkeypatch, *wanted)
    timed = tuner(tmp_path)
    ask(timed, model, config)
    questions = [*TILES, "attention", "attention of the last block", "add_layer_norm", "bias_gelu", "mlp"]
    assert list(asked(timed)) == questions
    assert not [row for choice in timed.choices for row in choice.rows if row.excluded]
    assert tiles.forward(shape) == forward[wanted[0]] != next(iter(forward.values()))
    assert tiles.backward(shape, 8) == backward[wanted[1]] != next(iter(backward.values()))
    assert model.implementation == Implementation("math", "math", True, True, True)

    # A run that resumes takes them from its checkpoint, and measures nothing.
    monkeypatch.setattr(choose.timing, "in_turns", None)
    tiles.use(shape)
    other = create_model(NANO, num_classes=5, drop_path=0.2)
    later = Tuner(World(torch.device("cpu")), earlier=timed.to_json(), file=tmp_path / "none.json")
    ask(later, other, config)
    assert {choice.origin for choice in later.choices} == {"checkpoint"}
    assert other.implementation == model.implementation
    assert tiles.forward(shape) == forward[wanted[0]] and tiles.backward(shape, 8) == backward[wanted[1]]


def test_what_is_named_is_not_asked(tmp_path, config, model, on_gpu):
    config.speed.attention = "sdpa"
    timed = tuner(tmp_path)
    ask(timed, model, config)
    assert list(asked(timed)) == ["add_layer_norm", "bias_gelu", "mlp"]
    assert model.implementation.attention == "sdpa"


@pytest.mark.parametrize(("width", "is_asked"), [(128, True), (192, True), (384, False)])
def test_the_mlp_is_asked_about_where_it_has_kernels(tmp_path, config, model, monkeypatch, on_gpu, width, is_asked):
    monkeypatch.setattr(model, "embed_dim", width)
    monkeypatch.setattr(student_tuning, "_choose_block", lambda *arguments: questions.append(arguments[4]))
    questions = []
    student_tuning.fusions(tuner(tmp_path), model, config, student_tuning.Arrangement.default(torch.device("cpu")))
    assert ("mlp" in questions) == is_asked


def test_off_is_plain_pytorch(tmp_path, config, model, on_gpu):
    off = Tuner(World(torch.device("cpu")), mode="off", file=tmp_path / "cache.json")
    ask(off, model, config)
    assert model.implementation == Implementation() and not off.choices


def test_a_wrong_attention_is_not_taken(tmp_path, config, model, monkeypatch):
    """Nor one that is right in all blocks but the last."""
    preferring(monkeypatch, "math")
    from fastdeit.models import implementation

    def wrong(qkv, first=None):
        out = implementation.ATTENTION["sdpa"](qkv, first)
        return out if first is None else out * 1.5

    monkeypatch.setitem(implementation.ATTENTION, "math", wrong)
    timed = tuner(tmp_path)
    ask(timed, model, config)
    assert model.implementation == Implementation("math", "sdpa")
    assert "disagrees" in asked(timed)["attention of the last block"].rows[1].excluded


def test_deterministic_leaves_out_what_is_not(tmp_path, config, model, monkeypatch):
    everything = ["sdpa", "math", "cudnn", "efficient", "xformers", "fa3", "flash"]
    monkeypatch.setattr(student_tuning.implementation, "candidates", lambda device: everything)
    preferring(monkeypatch)
    timed = tuner(tmp_path, deterministic=True)
    ask(timed, model, config)
    for choice in timed.choices:
        assert [row.candidate for row in choice.rows] == ["sdpa", "math", "flash"]


def test_a_block_is_computed_as_in_training(config, model, monkeypatch):
    """With the factors of its drop path, under autocast, for the first tokens in the last one."""
    seen = []
    monkeypatch.setattr(model.blocks[0].__class__, "forward", lambda self, *inputs: seen.append(inputs) or inputs[0])
    branches = student_tuning._Branches(model.blocks[0], 2, 0.2, 2)
    branches(torch.zeros(2, 18, 128))
    ((x, scale, first),) = seen
    assert x.shape == (2, 18, 128) and first == 2
    torch.testing.assert_close(scale, torch.full((2, 2), 1.25))
    assert student_tuning._Branches(model.blocks[0], 2, 0.0, None).scale is None


def test_the_key_knows_what_the_answer_depends_on(tmp_path, config, model, monkeypatch):
    preferring(monkeypatch)
    keys = []
    for change in ({}, {"batch_size": 3}, {"compile": False}):
        changed = dataclasses.replace(config, data=dataclasses.replace(config.data))
        changed.data.batch_size = change.get("batch_size", 2)
        timed = tuner(tmp_path)
        ask(timed, create_model(NANO, num_classes=5, drop_path=0.2), changed)
        keys.append(timed.choices[0].key)
    assert keys[0] == keys[2] != keys[1]
    assert keys[0]["tokens"] == [2, 18, 128] and keys[0]["queries"] is None and keys[0]["heads"] == 4
