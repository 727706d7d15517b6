import math

import pytest

from fastdeit.schedule import learning_rate, scaled_peak

TOTAL, WARMUP, PEAK, FLOOR, START = 1000, 50, 1e-3, 1e-5, 1e-6


def rate(step):
    return learning_rate(step, peak=PEAK, total_steps=TOTAL, warmup_steps=WARMUP, warmup_lr=START, min_lr=FLOOR)


def test_follows_the_closed_form():
    for step in range(TOTAL):
        if step < WARMUP:
            expected = START + (PEAK - START) * step / WARMUP
        else:
            expected = FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * step / TOTAL)) / 2
        assert rate(step) == pytest.approx(expected, rel=1e-12)


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
