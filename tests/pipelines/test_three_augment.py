import numpy as np
from scipy import stats

from fastdeit.pipelines import Augmentation
from fastdeit.pipelines.augment.augmentation import draw_views
from fastdeit.pipelines.augment.draws import Draws
from fastdeit.pipelines.augment.operations import Operation
from fastdeit.pipelines.augment.three_augment import draw_color_jitter, draw_three_augment

N = 20_000


def draws(n=N):
    return Draws(0, 0, np.arange(n), np.zeros(n))


def test_one_of_grey_solarize_and_blur():
    ops, args = draw_three_augment(draws())
    kinds = (Operation.COLOR, Operation.SOLARIZE, Operation.BLUR)
    counts = [int((ops == kind).sum()) for kind in kinds]
    assert sum(counts) == N and stats.chisquare(counts).pvalue > 0.01
    grey, solarize, blur = (args[ops == kind] for kind in kinds)
    assert (grey == 0).all() and (solarize == 128).all()
    assert stats.kstest(blur, "uniform", (0.1, 1.9)).pvalue > 0.01


def test_jitter_is_brightness_contrast_saturation_in_any_order():
    ops, args = draw_color_jitter(draws(), 0.3)
    jittered = {int(Operation.BRIGHTNESS), int(Operation.CONTRAST), int(Operation.COLOR)}
    assert all(set(row) == jittered for row in ops.tolist())
    _, counts = np.unique(ops, axis=0, return_counts=True)
    assert len(counts) == 6 and stats.chisquare(counts).pvalue > 0.01
    for column in args.T:
        assert stats.kstest(column, "uniform", (0.7, 0.6)).pvalue > 0.01
    assert draw_color_jitter(draws(), 2.0)[1].min() >= 0


def test_which_operations_a_view_has():
    def layers(**settings):
        augmentation = Augmentation(**settings)
        views = draw_views(augmentation, draws(500), np.full(500, 300), np.full(500, 400), 224)
        assert views.ops.shape == views.args.shape == (500, len(augmentation.layers))
        for column, possible in zip(views.ops.T, augmentation.layers):
            assert set(column.tolist()) == set(map(int, possible))
        return len(augmentation.layers)

    assert layers(aa="3aug") == 4
    assert layers(aa="3aug", color_jitter=0) == 1
    assert layers(aa="none") == 3
    assert layers(aa="none", color_jitter=0) == 0
    assert (
        layers(aa="rand-m9-mstd0.5-inc1", color_jitter=0.3) == 2
    )  # RandAugment switches colour jitter off, as in timm
    assert layers(aa="rand-n3") == 3
