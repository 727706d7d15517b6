"""The string, the arguments and the choices of RandAugment against timm's; 3-Augment and colour jitter."""

import random

import numpy as np
import pytest
from scipy import stats
from timm.data import auto_augment as timm_aa

from fastdeit.pipelines import Augmentation
from fastdeit.pipelines.augment.augmentation import draw_views
from fastdeit.pipelines.augment.auto_augment import OPERATIONS, RandAugment, draw_color_jitter, draw_three_augment
from fastdeit.pipelines.augment.draws import Draws
from fastdeit.pipelines.augment.operations import Operation

N = 20_000


def timm_policy(text):
    return timm_aa.rand_augment_transform(text, {"img_mean": (124, 116, 104)})


def draw(text, n=N):
    return RandAugment.parse(text).draw(Draws(0, 0, np.arange(n), np.zeros(n)))


STRINGS = ["rand-m9-mstd0.5-inc1", "rand", "rand-m7-n3-p0.8", "rand-m12-mmax15-mstd1.5-inc0", "rand-m5-mstd101-inc1"]


@pytest.mark.parametrize("text", STRINGS)
def test_parse_reads_what_timm_reads(text):
    if text.endswith("inc0"):
        pytest.importorskip("timm", minversion="1.0.31")  # older ones took inc0 for inc1
    ours, theirs = RandAugment.parse(text), timm_policy(text)
    op = theirs.ops[3]
    assert (ours.magnitude, ours.layers, ours.probability) == (op.magnitude, theirs.num_layers, op.prob)
    assert ours.magnitude_max == (op.magnitude_max or 10)
    assert ours.magnitude_std == op.magnitude_std or (ours.magnitude_std > 100 and op.magnitude_std == float("inf"))
    assert ours.increasing == theirs.ops[4].name.endswith("Increasing")


@pytest.mark.parametrize("text", ["rand-m", "rand-x3", "rand-m9-tweights", "augmix-m3", "rand-m9.5", "9", "rand--m9"])
def test_parse_refuses(text):
    with pytest.raises(ValueError, match="cannot read the RandAugment string"):
        RandAugment.parse(text)


@pytest.mark.parametrize("increasing", [0, 1])
def test_arguments_are_timms(increasing, monkeypatch):
    """At every magnitude and both signs; timm posterizes to 0 bits at the ends, which is clamped to 1."""
    if not increasing:
        pytest.importorskip("timm", minversion="1.0.31")  # older ones took inc0 for inc1
    magnitudes = np.concatenate([np.linspace(0, 10, 401), np.random.default_rng(0).uniform(0, 10, 400)])
    policy = RandAugment.parse(f"rand-inc{increasing}")
    for position, op in enumerate(OPERATIONS):
        level_to_arg = timm_policy(f"rand-inc{increasing}").ops[position].level_fn
        for sign in (1.0, -1.0):
            monkeypatch.setattr(timm_aa, "_randomly_negate", lambda value, sign=sign: sign * value)
            ours = policy.arguments(np.full(magnitudes.shape, op), magnitudes, np.full(magnitudes.shape, sign))
            theirs = [level_to_arg(m, {})[0] if level_to_arg else 0.0 for m in magnitudes.tolist()]
            if op == Operation.POSTERIZE:
                theirs = np.maximum(theirs, 1)
            assert np.array_equal(ours, np.float32(theirs)), op.name


def test_order_of_operations_is_timms():
    names = [op.name for op in timm_policy("rand").ops]
    assert [name.upper().replace("REL", "") for name in names] == [op.name.replace("_", "") for op in OPERATIONS]


@pytest.mark.parametrize("text, p", [("rand-m9-mstd0.5-inc1", 0.5), ("rand-n1-p0.9", 0.9)])
def test_choice_of_operations(text, p):
    ops, _ = draw(text)
    applied = ops != Operation.IDENTITY
    assert stats.binomtest(int(applied.sum()), applied.size, p).pvalue > 0.01
    for layer in range(ops.shape[1]):
        counts = np.bincount(ops[applied[:, layer], layer], minlength=17)[list(OPERATIONS)]
        assert stats.chisquare(counts).pvalue > 0.01
    if ops.shape[1] == 2:  # the layers choose independently, with replacement
        table = np.zeros((17, 17))
        np.add.at(table, (ops[:, 0], ops[:, 1]), 1)
        assert stats.chi2_contingency(table[table.sum(1) > 0][:, table.sum(0) > 0]).pvalue > 0.01


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "rand-m8-mstd2-inc1", "rand-m6-mstd101-inc1"])
def test_magnitudes_are_distributed_as_timms(text, monkeypatch):
    """The angle of rotation is the magnitude times 3 with a random sign; compared where timm makes it."""
    angles = []
    rotation = timm_policy(text).ops[3]
    rotation.prob, rotation.aug_fn = 1.0, lambda image, angle, **_: angles.append(angle)
    random.seed(0)
    for _ in range(N):
        rotation(None)
    ops, args = draw(text, 400_000)
    ours = args[ops == Operation.ROTATE]
    assert len(ours) > N
    assert stats.ks_2samp(ours, np.float32(angles)).pvalue > 0.01
    clipped = [int((np.abs(x) == 30).sum()) for x in (ours, np.float32(angles))]  # at the largest magnitude, 10
    table = [[clipped[0] + 1, clipped[1] + 1], [len(ours) - clipped[0], N - clipped[1]]]
    assert stats.chi2_contingency(table).pvalue > 0.01


# --- 3-Augment and colour jitter


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
    assert layers(aa="rand-m9-mstd0.5-inc1", color_jitter=0.3) == 2  # RandAugment turns jitter off, as in timm
    assert layers(aa="rand-n3") == 3


def test_the_magnitude_by_epoch():
    """RandAugment of an epoch is timm's with that magnitude: the same draws, other arguments."""
    augmentation = Augmentation(aa="rand-m9-mstd0.5-inc1", magnitudes=((0, 0), (3, 5), (7, 9)))
    heights = np.full(100, 64)
    for epoch, magnitude in ((0, 0), (2, 0), (3, 5), (6, 5), (7, 9), (50, 9)):
        draws = Draws(0, epoch, np.arange(100), np.zeros(100))
        views = draw_views(augmentation, draws, heights, heights, (32, 32))
        ops, args = RandAugment.parse(f"rand-m{magnitude}-mstd0.5-inc1").draw(draws)
        assert np.array_equal(views.ops, ops) and np.array_equal(views.args, args)
    late = Augmentation(aa="rand-m9-mstd0.5-inc1", magnitudes=((3, 5),))  # before the first: the string's
    assert late.rand_augment_in(2).magnitude == 9 and late.rand_augment_in(3).magnitude == 5
    with pytest.raises(ValueError, match="magnitudes are RandAugment's, and aa is '3aug'"):
        Augmentation(aa="3aug", magnitudes=((0, 0),))
