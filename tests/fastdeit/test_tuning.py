"""Choices by measurement, of candidates that take time: what is excluded, how it is timed, whose word counts."""

import queue
import threading
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastdeit.distributed.world import World
from fastdeit.errors import UserError
from fastdeit.tuning import Tuner, choose, timing

from . import candidates
from .candidates import CPU, RESULT, again, ask, excluded, raising, taking

few_rounds, tuner_fixture = candidates.few_rounds, candidates.measuring_tuner  # fixtures


def test_the_fastest_is_chosen_and_its_time_is_the_clocks(tuner):
    choice = ask(tuner, {"plain": taking(8), "quick": taking(1), "slow": taking(24)})
    assert choice.chosen == "quick" and choice.origin == "measured" and not excluded(choice)
    times = {row.candidate: row.ms for row in choice.rows}
    for name, least in {"plain": 8, "quick": 1, "slow": 24}.items():
        assert least <= times[name] < least + 50, times
    assert list(times) == ["plain", "quick", "slow"] and choice.seconds > 0.05


@pytest.mark.parametrize(("times", "winner"), [((100, 99), "plain"), ((100, 97), "other"), ((100, 98.5), "plain")])
def test_a_challenger_must_win_by_two_percent(monkeypatch, tuner, times, winner):
    measured = dict(zip(("plain", "other"), times))
    monkeypatch.setattr(timing, "in_turns", lambda calls, *_, **__: {name: float(measured[name]) for name in calls})
    assert ask(tuner, {"plain": taking(0), "other": taking(0)}).chosen == winner


@pytest.mark.parametrize(("again", "winner"), [((100, 97), "other"), ((100, 99), "plain"), ((100, None), "plain")])
def test_who_wins_once_must_win_again(monkeypatch, tuner, again, winner):
    measurements = [(100, 90, 95), again]
    asked = []

    def in_turns(calls, *_, **__):
        asked.append(list(calls))
        times = measurements[len(asked) - 1]
        return {n: RuntimeError("late") if ms is None else float(ms) for n, ms in zip(calls, times)}

    monkeypatch.setattr(timing, "in_turns", in_turns)
    choice = ask(tuner, {name: taking(0) for name in ("plain", "other", "third")})
    assert choice.chosen == winner and asked == [["plain", "other", "third"], ["plain", "other"]]
    assert choice.notes == (() if winner == "other" else ("other won the first of two measurements only",))
    assert [row.ms for row in choice.rows] == [100, 90, 95]


def test_what_disagrees_is_excluded_however_fast(tuner):
    off = RESULT.clone()
    off[1, 2] += 0.01 * RESULT.norm()
    nan = RESULT.clone()
    nan[0, 0] = float("nan")
    choice = ask(
        tuner,
        {"plain": taking(10), "off": taking(0, off), "nan": taking(0, nan), "shape": taking(0, RESULT[:2]),
         "more": taking(0, torch.stack([RESULT, RESULT])), "near": taking(1, RESULT * (1 + 1e-6))},
    )  # fmt: skip
    assert choice.chosen == "near"
    assert excluded(choice).keys() == {"off", "nan", "shape", "more"}
    assert "disagrees: 1.0e-02 of the norm, 3.5e-04 allowed" in excluded(choice)["off"]
    assert choice.rows[-1].error == pytest.approx(1e-6, rel=0.1)


def test_each_tensor_counts_for_itself(tuner):
    """A wrong small gradient beside a large output."""

    def pair(gradient):
        return lambda: lambda: {"output": RESULT * 1e6, "gradients": (gradient,)}

    choice = ask(tuner, {"plain": pair(torch.ones(4)), "wrong": pair(torch.zeros(4))})
    assert choice.chosen == "plain" and "disagrees: 1.0e+00" in excluded(choice)["wrong"]


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float32, 3.45e-4), (torch.float16, 0.03125), (torch.bfloat16, 0.0884)]
)
def test_the_tolerance_is_half_of_the_dtypes_digits(tuner, dtype, allowed):
    assert choose.tolerance_of(dtype, CPU) == pytest.approx(allowed, rel=1e-2)
    within, beyond = (taking(0, RESULT * (1 + factor * allowed)) for factor in (0.9, 1.1))
    choice = ask(tuner, {"plain": taking(10), "within": within, "beyond": beyond}, dtype=dtype)
    assert choice.chosen == "within" and excluded(choice).keys() == {"beyond"}


def test_what_raises_or_runs_out_of_memory_is_excluded_with_its_reason(tuner):
    too_large = lambda: lambda: torch.empty(2**58)  # noqa: E731 - a real failure to allocate
    late = iter([RESULT])
    candidates = {
        "plain": taking(10), "missing": raising(ModuleNotFoundError("No module named 'xformers'")),
        "memory": too_large, "gpu": raising(torch.OutOfMemoryError("CUDA out of memory. Tried ...")),
        "late": lambda: lambda: next(late),
    }  # fmt: skip
    choice = ask(tuner, candidates)
    assert choice.chosen == "plain" and choice.origin == "measured"
    assert excluded(choice) == {
        "missing": "ModuleNotFoundError: No module named 'xformers'", "memory": "out of memory",
        "gpu": "out of memory", "late": "StopIteration",
    }  # fmt: skip


def test_what_failed_has_let_go_of_its_memory_before_the_next_is_built(tuner):
    held, alive = [], []

    def hungry():
        network = torch.nn.Linear(4, 4)
        held.append(weakref.ref(network))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def next_one():
        alive.append(held[0]() is not None)
        return taking(1)()

    assert ask(tuner, {"plain": taking(10), "hungry": hungry, "next": next_one}).chosen == "next"
    assert alive == [False]


def test_candidates_are_gone_when_the_run_begins(tuner):
    held = []

    def build():
        network = torch.nn.Linear(4, 4)
        held.append(weakref.ref(network))
        return lambda: network.weight * 0 + 1

    ask(tuner, {"plain": build, "other": build})
    assert len(held) == 2 and not any(network() for network in held)


@pytest.mark.parametrize("cold", [True, False])
def test_on_a_gpu_events_surround_each_call_while_it_is_busy(monkeypatch, cold):
    """Imitated: what is asked of the GPU, in which order."""
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append(self)

        def elapsed_time(self, after):
            return (
                7.0 if asked.index(after) == asked.index(self) + 2 and asked[asked.index(self) + 1] == "call" else 0.0
            )

    class Other(torch.Tensor):
        def zero_(self):
            asked.append(f"flush {len(self)}")

    gpu = SimpleNamespace(L2_cache_size=50, clock_rate=1000)
    for name, value in {
        "get_device_properties": lambda device: gpu, "synchronize": lambda device: asked.append("wait"), "Event": Event,
        "_sleep": lambda cycles: asked.append("sleep" if cycles > 0 else "no sleep"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    sample = timing._Events(CPU, cold)
    if cold:
        sample.other = sample.other.as_subclass(Other)
    assert sample(lambda: time.sleep(0.001) or asked.append("call")) == [7.0] * timing.QUEUED
    words = [one if isinstance(one, str) else "event" for one in asked]
    flush = ["flush 100"] if cold else []
    assert words == ["wait", "call", "sleep", *[*flush, "event", "call", "event"] * timing.QUEUED, "wait"]


def test_where_the_default_fails_nothing_is_chosen_or_remembered(tuner):
    choice = ask(tuner, {"plain": raising(RuntimeError("broken")), "other": taking(0)})
    assert (choice.chosen, choice.origin) == ("plain", "default") and "RuntimeError: broken" in tuner.table()
    assert not tuner.file.exists()


def test_deterministic_leaves_out_what_is_not(tuner):
    candidates = {"plain": taking(10), "atomics": taking(0)}
    assert ask(tuner, candidates, nondeterministic=["atomics"]).chosen == "atomics"
    strict = replace(tuner, deterministic=True, choices=[])
    assert ask(strict, candidates, nondeterministic=["atomics"]).chosen == "plain"


def test_the_random_state_of_the_run_is_left_alone(tuner):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn = lambda: (lambda x: lambda: x)(torch.randn(4))  # noqa: E731 - the same for each candidate
    choice = ask(tuner, {"plain": drawn, "other": drawn})
    assert not excluded(choice) and torch.equal(torch.rand(3), expected)


def test_a_candidate_far_behind_takes_few_turns(tuner):
    calls = []
    ask(tuner, {"plain": taking(1), "far": taking(20, calls=calls)})
    assert len(calls) == 1 + 2 * timing.LOOK < 1 + 2 * timing.AT_LEAST


def test_off_asks_nobody(tmp_path):
    tuner = Tuner(World(CPU), mode="off", measures=True, file=tmp_path / "tuning.json")
    assert ask(tuner, {"plain": raising(AssertionError()), "other": taking(0)}).chosen == "plain"
    assert tuner.table() == "" and tuner.choices == [] and not tuner.file.exists()


def test_not_inside_a_compiled_function(tuner):
    function = torch.compile(lambda x: x if ask(tuner, {"plain": taking(0)}).chosen == "plain" else -x, backend="eager")
    with pytest.raises(AssertionError, match="forbidden"):
        function(RESULT)


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks


class Ranked(World):
    """One of two ranks in threads; what rank 0 broadcasts, rank 1 receives."""

    LINE: queue.Queue = queue.Queue()

    def broadcast(self, value):
        if self.is_main:
            self.LINE.put(value)
            return value
        return self.LINE.get(timeout=20)


@pytest.mark.parametrize("plain", [taking(10), raising(RuntimeError("broken"))])
def test_all_ranks_take_the_word_of_rank_0(tuner, plain):
    built = []
    other = lambda: built.append(1) or taking(1)()  # noqa: E731
    answers = {}

    def rank(number):
        own = replace(tuner, world=Ranked(CPU, number, 2), choices=[])
        candidates = {"plain": plain if number == 0 else raising(AssertionError()), "other": other}
        answers[number] = [ask(own, candidates), ask(own, candidates, question="what")], own.to_json()

    threads = [threading.Thread(target=rank, args=[number]) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers[0] == answers[1] and len(answers[1][0]) == 2
    works = plain is not None and answers[0][0][0].origin == "measured"
    assert [choice.chosen for choice in answers[1][0]] == (["other"] * 2 if works else ["plain"] * 2)
    assert len(built) == (2 if works else 0) and Ranked.LINE.empty()


# ---------------------------------------------------------------------------------------------------------------------
# A GPU whose context is lost


def test_a_candidate_that_breaks_the_gpu_is_left_out_of_the_next_start(tuner, monkeypatch):
    """Imitated: on this device, nothing computes once it has raised."""
    lost = []

    def failed(self, name, reason):
        if lost:
            raise choose._ContextLost(name, "illegal address")
        return choose.Row(name, excluded=reason)

    monkeypatch.setattr(choose._Measurement, "_failed", failed)
    breaking = lambda: lost.append(1) or raising(RuntimeError("illegal address"))()  # noqa: E731
    candidates = {"plain": taking(10), "breaking": breaking, "other": taking(1)}
    with pytest.raises(UserError, match=r"breaking has broken the GPU's context .*start again: it will be left out"):
        ask(tuner, candidates)
    lost.clear()
    choice = ask(again(tuner), candidates)
    assert choice.chosen == "other" and excluded(choice) == {"breaking": "illegal address"} and not lost
