"""The string, the arguments and the choices of RandAugment against timm's."""

import random

import numpy as np
import pytest
from scipy import stats
from timm.data import auto_augment as timm_aa

from fastdeit.pipelines.augment.draws import Draws
from fastdeit.pipelines.augment.operations import Operation
from fastdeit.pipelines.augment.rand_augment import OPERATIONS, RandAugment

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
