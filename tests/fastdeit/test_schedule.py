import math

import pytest

from fastdeit.training.optimizer import (
    Rates,
    average_decay,
    average_in_words,
    learning_rate,
    rates_in_words,
    scaled_peak,
    scaled_rates,
)

TOTAL, WARMUP, PEAK, FLOOR, START = 1000, 50, 1e-3, 1e-5, 1e-6


def rate(step):
    return learning_rate(step, peak=PEAK, total_steps=TOTAL, warmup_steps=WARMUP, warmup_lr=START, min_lr=FLOOR)


def test_moves_at_every_step_and_ends_at_the_floor():
    rates = [rate(step) for step in range(TOTAL + 1)]
    assert len(set(rates)) == TOTAL + 1
    assert rates[0] == START and rates[-1] == pytest.approx(FLOOR)
    assert max(rates) == rates[WARMUP]


def test_equals_timms_cosine_scheduler():
    torch = pytest.importorskip("torch")
    scheduler_module = pytest.importorskip("timm.scheduler.cosine_lr")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = scheduler_module.CosineLRScheduler(
        optimizer, t_initial=TOTAL, lr_min=FLOOR, warmup_t=WARMUP, warmup_lr_init=START, t_in_epochs=False
    )
    for step in (0, 1, 25, 49, 50, 51, 500, 999):
        scheduler.step_update(step)
        assert rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


def test_without_warmup_starts_at_the_peak():
    assert learning_rate(0, peak=PEAK, total_steps=TOTAL, warmup_steps=0) == PEAK


def test_peak_scales_with_the_global_batch():
    assert scaled_peak(5e-4, 1024) == 1e-3
    assert scaled_peak(5e-4, 1024, scale=False) == 5e-4


@pytest.mark.parametrize(
    "settings, batch, start, peak, floor",
    [
        ((5e-4, 1e-6, 1e-5), 1024, 1e-6, 1e-3, 1e-5),  # the paper: only the peak is scaled
        ((5e-6, 1e-6, 5e-6), 512, 1e-6, 5e-6, 5e-6),  # README_deit.md, fine-tuning at 384: constant after the warm-up
        ((5e-4, 1e-6, 1e-5), 16, 1e-6 / 32, 5e-4 / 32, 1e-5 / 32),
        ((5e-4, 1e-6, 1e-5), 2, 1e-6 / 256, 5e-4 / 256, 1e-5 / 256),
        ((1e-6, 1e-5, 1e-4), 512, 1e-6, 1e-6, 1e-6),  # none is above the peak
    ],
)
def test_a_small_batch_decays_as_far_as_a_large_one(settings, batch, start, peak, floor):
    rates = scaled_rates(*settings, batch)
    assert (rates.start, rates.peak, rates.floor) == pytest.approx((start, peak, floor), rel=1e-12)


def test_rates_left_as_they_are():
    assert scaled_rates(4e-3, 1e-6, 1e-5, 16, scale=False) == Rates(start=1e-6, peak=4e-3, floor=1e-5)


def test_decay_of_the_average_is_tensorflows():
    """tf.train.ExponentialMovingAverage with num_updates: "min(decay, (1 + num_updates) / (10 + num_updates))"."""
    assert [average_decay(step, 0.99996) for step in (0, 1, 90)] == pytest.approx([1 / 10, 2 / 11, 91 / 100])
    assert average_decay(224_980, 0.99996) < 0.99996 == average_decay(225_000, 0.99996)
    assert average_decay(90, 0.5) == 0.5


def test_the_average_leaves_the_first_weights_behind():
    assert math.prod(average_decay(step, 0.99996) for step in range(10)) < 2e-5
    assert math.prod(average_decay(step, 0.99996) for step in range(100)) < 1e-12


def test_the_rates_in_words():
    told = rates_in_words(
        scaled_rates(5e-4, 1e-6, 1e-5, 1024), lr=5e-4, global_batch=1024, total_steps=9000, warmup_steps=1500
    )
    assert told == "learning rate from 1e-06 in 1,500 steps to 0.001 (--lr 0.0005 x 1024 / 512), then down to 1e-05"
    flat = {"lr": 1e-5, "global_batch": 512, "total_steps": 100}
    assert rates_in_words(Rates(1e-6, 1e-5, 1e-5), warmup_steps=0, **flat) == (
        "learning rate 1e-05, where it stays, as --min-lr is not below it"
    )
    told = rates_in_words(Rates(1e-6, 1e-5, 1e-6), warmup_steps=100, **flat)
    assert told.startswith("warning: ") and "--warmup-epochs" in told


def test_the_average_in_words():
    assert average_in_words(0.5, 3) == "moving average at the end over the last step, a ninth of the run: " + (
        "--model-ema-decay 0.5 is for longer ones"
    )
    assert average_in_words(0.99, 1000) == "moving average at the end over the last 100 steps"
    assert average_in_words(0.99996, 891) == (
        "moving average at the end over the last 100 steps, a ninth of the run: --model-ema-decay 0.99996 is for "
        "longer ones"
    )
