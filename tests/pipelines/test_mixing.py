"""Mixing and erasing against timm's distributions; who mixes with whom whatever the number of processes."""

import random

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing

from fastdeit.pipelines import Augmentation
from fastdeit.pipelines.augment.augmentation import draw_mix
from fastdeit.pipelines.augment.draws import Draws
from fastdeit.pipelines.augment.mixing import draw_erasing, draw_mixing

N, SIZE = 20_000, 224


def draws(n=N):
    return Draws(0, 0, np.arange(n), np.zeros(n))


def timm_draws(mixup, cutmix, probability, switch_probability, size):
    """(lam, box) of N draws of timm's batch mode."""
    np.random.seed(0)  # noqa: NPY002 (timm draws from it)
    theirs = Mixup(mixup, cutmix, prob=probability, switch_prob=switch_probability, num_classes=10)
    for _ in range(N):
        lam, use_cutmix = theirs._params_per_batch()
        if not use_cutmix:
            yield lam, (0, 0, 0, 0)
            continue
        (yl, yh, xl, xh), lam = cutmix_bbox_and_lam((3, *size), lam)
        yield lam, (yl, xl, yh, xh) if (yh - yl) * (xh - xl) else (0, 0, 0, 0)


@pytest.mark.parametrize(
    "mixup, cutmix, probability, switch_probability",
    [(0.8, 1.0, 1.0, 0.5), (0.8, 0.0, 1.0, 0.5), (0.0, 1.0, 0.7, 0.5), (0.2, 0.4, 0.9, 0.3)],
)
@pytest.mark.parametrize("size", [(SIZE, SIZE), (40, 96)])
def test_lambdas_and_boxes_are_distributed_as_timms(mixup, cutmix, probability, switch_probability, size):
    settings = (mixup, cutmix, probability, switch_probability)
    lam, box = draw_mixing(
        draws(), size=size, mixup=mixup, cutmix=cutmix, probability=probability, switch_probability=switch_probability
    )
    their_lam, their_box = map(np.array, zip(*timm_draws(*settings, size)))
    is_box, their_is_box = box.any(1), their_box.any(1)
    assert (
        stats.chi2_contingency(
            [np.bincount(is_box, minlength=2) + 1, np.bincount(their_is_box, minlength=2) + 1]
        ).pvalue
        > 0.01
    )
    for ours, theirs in [(lam[~is_box], their_lam[~their_is_box]), (lam[is_box], their_lam[their_is_box])]:
        assert (len(ours) > 0) == (len(theirs) > 0)
        assert not len(ours) or stats.ks_2samp(ours, np.float32(theirs)).pvalue > 0.01
    if cutmix:
        for column in range(4):
            assert stats.ks_2samp(box[is_box, column], their_box[their_is_box, column]).pvalue > 0.01
        area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
        assert np.array_equal(lam[is_box], np.float32(1 - area / (size[0] * size[1]))[is_box])


@pytest.mark.parametrize("size", [(96, 96), (16, 16), (48, 120)])
def test_erased_boxes_are_distributed_as_timms(size):
    box, seed = draw_erasing(draws(), 0.25, size)
    random.seed(0)
    eraser = RandomErasing(0.25, mode="const", device="cpu")
    theirs = np.zeros((N, 4), int)
    for row in range(N):
        image = torch.ones(1, *size)
        eraser(image)
        if not image.all():
            ys, xs = (image[0] == 0).nonzero().T
            theirs[row] = ys[0], xs[0], ys[-1] + 1, xs[-1] + 1
    erased, their_erased = box.any(1), theirs.any(1)
    assert stats.chi2_contingency([np.bincount(erased), np.bincount(their_erased)]).pvalue > 0.01
    for ours, reference in [(box[erased], theirs[their_erased])]:
        for values in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2] - b[:, 0], lambda b: b[:, 3] - b[:, 1]):
            assert stats.ks_2samp(values(ours), values(reference)).pvalue > 0.01
    assert len(np.unique(seed)) == N and seed.min() >= 0 and seed.max() < 2**62


@pytest.mark.parametrize("mode, distinct", [("batch", 1), ("pair", 16), ("elem", 32)])
def test_neighbours_mix(mode, distinct):
    indices, copies = np.arange(32) * 3 + 1, np.zeros(32, int)
    partner, lam, box = draw_mix(Augmentation(mixup_mode=mode, cutmix=0), 0, 0, np.array([5]), indices, copies, SIZE)
    assert partner.tolist() == [i ^ 1 for i in range(32)] and not box.any()
    assert len(np.unique(lam)) == distinct
    if mode == "pair":
        assert np.array_equal(lam[0::2], lam[1::2])


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixing_does_not_depend_on_how_a_batch_is_shared(mode):
    indices, copies = np.random.default_rng(0).permutation(48), np.arange(48) % 3
    augmentation = Augmentation(mixup_mode=mode)
    partner, lam, box = draw_mix(augmentation, 1, 2, np.array([3]), indices, copies, SIZE)
    for ranks in (2, 3, 4):
        for rank in range(ranks):
            rows = slice(rank * 48 // ranks, (rank + 1) * 48 // ranks)
            part = draw_mix(augmentation, 1, 2, np.array([3]), indices[rows], copies[rows], SIZE)
            assert np.array_equal(part[0] + rows.start, partner[rows])
            assert np.array_equal(part[1], lam[rows]) and np.array_equal(part[2], box[rows])


def test_where_nothing_is_mixed_a_sample_is_its_own_partner():
    indices = np.arange(400)
    partner, lam, box = draw_mix(
        Augmentation(mixup_mode="elem", mixup_prob=0.5), 0, 0, np.array([0]), indices, indices * 0, SIZE
    )
    alone = lam == 1
    assert 120 < alone.sum() < 280
    assert np.array_equal(partner[alone], indices[alone]) and not box[alone].any()
    assert np.array_equal(partner[~alone], (indices ^ 1)[~alone])
    partner, lam, box = draw_mix(Augmentation(mixup=0, cutmix=0), 0, 0, np.array([0]), indices, indices * 0, SIZE)
    assert np.array_equal(partner, indices) and (lam == 1).all() and not box.any()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"hflip": 1.5}, "hflip is a probability"),
        ({"mixup": -1.0}, "mixup must not be negative"),
        ({"mixup_mode": "half"}, "mixup_mode must be one of batch, pair, elem"),
        ({"scale": (0.5, 0.2)}, "scale must be"),
        ({"scale": (0.0, 1.0)}, "scale must be"),
        ({"aa": "rand-q3"}, "cannot read the RandAugment string"),
    ],
)
def test_settings_that_cannot_be_meant(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)
