"""The estimate of the time left, against runs whose every second is known."""

import pytest

from fastdeit.training.log import Log
from fastdeit.training.remaining import FIRST, WARM_UP, Remaining


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def simulated(*, step, evaluation, compiling=0.0, steps=40, epoch=10, forwards=0.0):
    """Makes a run of these seconds; yields (step, estimate, true seconds left) after each step and evaluation."""
    clock, ends = Clock(), list(range(epoch, steps + 1, epoch))
    remaining = Remaining(steps, ends, forwards=forwards, clock=clock)
    compiling_left = compiling
    for number in range(1, steps + 1):
        clock.now += step + (compiling if number == 1 else 0)
        remaining.stepped()
        left = step * (steps - number)
        yield number, remaining.seconds(number), left + evaluation * sum(end >= number for end in ends), "step"
        if number in ends:
            clock.now += 0.5  # saving
            clock.now += evaluation + compiling_left
            remaining.evaluated(evaluation + compiling_left, compiled=compiling_left > 0)
            compiling_left = 0.0
            yield number, remaining.seconds(number), left + evaluation * sum(end > number for end in ends), "evaluation"


def test_after_a_few_steps_and_without_the_compilation():
    found = list(simulated(step=2.0, evaluation=0.0, compiling=100.0, epoch=40))
    assert [estimate for _, estimate, _, _ in found[: WARM_UP + FIRST - 1]] == [None] * (WARM_UP + FIRST - 1)
    number, estimate, left, _ = found[WARM_UP + FIRST - 1]
    assert number == 5 and estimate == left == 70.0


def test_evaluations_are_in_it_from_the_first():
    """An evaluation of as many images as 6 steps have costs two steps until it has been timed."""
    found = list(simulated(step=2.0, evaluation=4.0, forwards=6.0))
    for number, estimate, left, kind in found[WARM_UP + FIRST - 1 : 9]:
        assert kind == "step" and estimate == pytest.approx(left), number
    found = list(simulated(step=2.0, evaluation=10.0, forwards=6.0, compiling=50.0))
    after = [(estimate, left) for _, estimate, left, kind in found if kind == "evaluation"]
    saving = 0.5 / 8  # a step's share: the first two steps of ten do not count
    assert after[0][0] == pytest.approx(30 * (2 + saving) + 3 * 6 * (2 + saving) / 3)  # that had the compilation in it
    for estimate, left in after[1:]:
        assert estimate == pytest.approx(left, rel=0.05)
    assert after[-1] == (0.0, 0.0)


def test_a_resumed_run_counts_its_own_steps():
    clock = Clock()
    remaining = Remaining(1000, [], clock=clock)
    for _ in range(901, 907):
        clock.now += 3600.0
        remaining.stepped()
    assert remaining.seconds(906) == 94 * 3600 and remaining.words(906) == "94:00:00"


def test_steps_of_smaller_images_cost_less():
    """60 steps of a quarter of the cost, then 20: known from the first, while steps cost what their work says."""
    clock, work = Clock(), lambda step: min(step, 60) / 4 + max(0, step - 60)
    remaining = Remaining(80, [40, 80], clock=clock, forwards=6.0, work=work)
    for step in range(1, 81):
        clock.now += 2.0 if step > 60 else 0.5
        remaining.stepped()
        if step >= WARM_UP + FIRST:
            evaluations = 4.0 * sum(end > step for end in (40, 80))  # a third of the work of six steps at the full size
            expected = 0.5 * max(0, 60 - step) + 2.0 * min(20, 80 - step) + evaluations
            assert remaining.seconds(step) == pytest.approx(expected)


def test_words():
    clock = Clock()
    remaining = Remaining(3660, [], clock=clock)
    for _ in range(5):
        assert remaining.words(0) == "-:--:--"
        clock.now += 1.0
        remaining.stepped()
    assert remaining.words(0) == "1:01:00" and remaining.words(3655) == "0:00:05"


def test_the_first_estimate_is_said_once(capsys):
    clock = Clock()
    log = Log(None, total_steps=100, title="student", remaining=Remaining(100, [], clock=clock))
    for step in range(1, 20):
        clock.now += 2.0
        log.stepped(step, images=64)
    assert capsys.readouterr().out == "  step 5/100  32 images/s  left 0:03:10, by the first steps\n"
