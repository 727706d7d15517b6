"""What the tuner remembers: on the machine for later runs, in a checkpoint for a run that resumes."""

import json
from dataclasses import replace

import pytest
import torch

from fastdeit.tuning import Choice, Row, cache

from . import candidates
from .candidates import CPU, FAST, SLOW, again, ask, taking

few_rounds, tuner_fixture = candidates.few_rounds, candidates.measuring_tuner  # fixtures

# ---------------------------------------------------------------------------------------------------------------------
# What is remembered


def test_a_choice_is_remembered_until_something_it_depends_on_changes(tuner, monkeypatch):
    assert ask(tuner, FAST).chosen == "other"
    remembered = ask(again(tuner), SLOW)
    assert (remembered.chosen, remembered.origin) == ("other", "cache")
    assert remembered.rows == tuner.choices[0].rows  # the figures too
    for changes in (
        {"key": {"shape": [3, 5]}}, {"key": {"model": "b"}}, {"dtype": torch.float64}, {"question": "what"},
    ):  # fmt: skip
        assert ask(again(tuner), SLOW, **changes).origin == "measured", changes
    assert ask(again(tuner), {**SLOW, "third": taking(4)}).origin == "measured"
    assert ask(again(tuner), SLOW).origin == "cache"
    assert ask(again(tuner, mode="fresh"), SLOW).chosen == "plain"
    assert ask(again(tuner), FAST).chosen == "plain"  # the fresh answer is the one remembered


@pytest.mark.parametrize("name", ["device", "driver", "torch", "triton", "cuDNN", "fastdeit"])
def test_another_machine_or_version_is_measured_again(tuner, monkeypatch, name):
    ask(tuner, FAST)
    here = cache.circumstances(CPU)
    monkeypatch.setattr(cache, "circumstances", lambda device: here | {name: "another"})
    assert ask(again(tuner), SLOW).chosen == "plain"


@pytest.mark.parametrize("name", ["device", "driver", "torch", "triton", "cuDNN", "fastdeit"])
def test_what_a_choice_on_a_gpu_depends_on(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert cache.circumstances(torch.device("cuda"))[name]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"form": 0, "choices": {}}', '{"form": 1, "choices": []}', "\x00\xff"]
)
def test_an_unreadable_cache_is_measured_again_and_replaced(tuner, content):
    tuner.file.parent.mkdir()
    tuner.file.write_text(content, encoding="latin-1")
    assert ask(tuner, FAST).origin == "measured"
    assert ask(again(tuner), SLOW).origin == "cache"


def test_a_cache_of_another_form_is_not_read(tuner):
    ask(tuner, FAST)
    tuner.file.write_text(tuner.file.read_text().replace('"form": 1', '"form": 2'))
    assert ask(again(tuner), FAST).origin == "measured"


@pytest.mark.parametrize("spoilt", [[], {}, {"chosen": "other"}, {"rows": [{"odd": 1}]}, {"chosen": "gone"}])
def test_an_entry_of_another_form_is_measured_again(tuner, spoilt):
    ask(tuner, FAST)
    content = json.loads(tuner.file.read_text())
    ((key, entry),) = content["choices"].items()
    content["choices"][key] = entry | spoilt if "rows" in spoilt or spoilt == {"chosen": "gone"} else spoilt
    tuner.file.write_text(json.dumps(content))
    assert ask(again(tuner), FAST).origin == "measured"


def test_a_cache_that_cannot_be_written_costs_only_the_next_measurement(tuner):
    tuner.file.parent.write_text("a file where the folder should be")
    assert ask(tuner, FAST).chosen == "other"


def test_only_what_is_remembered_counts_where_nothing_is_measured(tuner):
    silent = again(tuner, measures=None)  # auto on a CPU
    assert (ask(silent, FAST).chosen, silent.table()) == ("plain", "")
    ask(tuner, FAST)
    assert ask(again(silent), SLOW).chosen == "other"


def test_the_table(tuner):
    """Every figure once, in its column."""
    rows = (Row("plain", 4.0, 0.0), Row("quick", 1.0, 3e-6), Row("gone", excluded="out of memory"))
    key = {"model": "m", "shape": [3, 4], "compiled": True, "frozen": None, "way": {"attention": "sdpa", "a": True}}
    tuner.choices = [Choice("what", "quick", "plain", key, {}, "measured", rows, 1.25, ("a note",))]
    assert tuner.table().splitlines() == [
        "what: quick (measured in 1.2 s; m, 3x4, compiled, way sdpa + a)",
        "  a note",
        "  candidate     ms  ratio  difference",
        "  plain      4.000   1.00       0e+00  default",
        "  quick      1.000   0.25       3e-06  chosen",
        "  gone           -      -           -  excluded: out of memory",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def resumed(tuner, tmp_path, **changes):
    saved = json.loads(json.dumps(tuner.to_json()))
    return replace(tuner, choices=[], earlier=[one | changes for one in saved], file=tmp_path / "another.json")


def test_the_checkpoints_choice_outranks_the_cache(tuner, tmp_path):
    ask(tuner, FAST)
    later = resumed(tuner, tmp_path)
    ask(again(later, earlier=()), SLOW)  # the cache of the machine it is resumed on says plain
    choice = ask(later, SLOW)
    assert (choice.chosen, choice.origin) == ("other", "checkpoint")
    assert ask(later, SLOW, key={"shape": [9, 9]}).chosen == "other"  # the same computation on another batch
    assert ask(again(later, measures=None), SLOW).chosen == "other"
    assert later.to_json()[0]["rows"] == tuner.to_json()[0]["rows"]


def test_so_does_a_default_that_nobody_measured(tuner, tmp_path):
    ask(again(tuner, measures=None), FAST)
    silent = again(tuner, measures=None)
    ask(silent, FAST)
    assert ask(resumed(silent, tmp_path), FAST).chosen == "plain"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"here": {"device": "NVIDIA A100", "torch": torch.__version__}}, "other, was made elsewhere (device NVIDIA A"),
        ({"chosen": "gone"}, "the checkpoint's choice, gone, does not exist here"),
        ({"rows": 3}, "of another form"),
    ],
)  # fmt: skip
def test_a_choice_that_does_not_exist_here_is_said_and_measured_again(tuner, tmp_path, changes, words):
    ask(tuner, FAST)
    later = resumed(tuner, tmp_path, **changes)
    choice = ask(later, SLOW)
    assert (choice.chosen, choice.origin) == ("plain", "measured")
    assert words in later.table() and words in choice.notes[0]


def test_another_driver_does_not_undo_a_checkpoints_choice(tuner, tmp_path, monkeypatch):
    here = cache.circumstances(CPU)
    monkeypatch.setattr(cache, "circumstances", lambda device: here | {"driver": "580.1"})
    ask(tuner, FAST)
    monkeypatch.setattr(cache, "circumstances", lambda device: here | {"driver": "580.2"})
    assert ask(resumed(tuner, tmp_path), SLOW).origin == "checkpoint"
