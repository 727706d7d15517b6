"""Philox against Random123's published answers; draws that depend on nothing but their key."""

import numpy as np
import pytest
from scipy import stats

from fastdeit.pipelines.augment.draws import Draws, Purpose, integers, philox4x32

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert tuple(philox4x32(np.array(counter, np.uint64), key).tolist()) == expected


def test_a_sample_draws_the_same_in_any_company():
    index, copy = np.arange(50) * 7919, np.arange(50) % 3
    together = Draws(3, 5, index, copy).words(Purpose.CROP, 22)
    order = np.random.default_rng(0).permutation(50)
    assert np.array_equal(Draws(3, 5, index[order], copy[order]).words(Purpose.CROP, 22), together[order])
    assert np.array_equal(Draws(3, 5, index[7:8], copy[7:8]).words(Purpose.CROP, 5)[0], together[7, :5])


def test_every_part_of_the_key_matters():
    def words(seed=1, epoch=2, index=3, copy=0, purpose=Purpose.CROP):
        return tuple(Draws(seed, epoch, np.array([index]), np.array([copy])).words(purpose, 8)[0].tolist())

    changed = [words(seed=2), words(epoch=3), words(index=4), words(copy=1), words(purpose=Purpose.FLIP)]
    everything = {word for draw in (words(), *changed) for word in draw}
    assert len(everything) == 6 * 8  # not one word in common


def test_uniform_and_integers_are_uniform():
    uniform = Draws(0, 0, np.arange(20_000), np.zeros(20_000)).uniform(Purpose.ERASE, 3)
    assert uniform.min() > 0 and uniform.max() < 1
    for column in uniform.T:
        assert stats.kstest(column, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(uniform.T) - np.eye(3)).max() < 0.03
    assert stats.chisquare(np.bincount(integers(uniform[:, 0], 15), minlength=15)).pvalue > 0.01


@pytest.mark.parametrize("seed, epoch", [(-1, 0), (2**32, 0), (0, -1)])
def test_key_out_of_range(seed, epoch):
    with pytest.raises(ValueError, match=r"must be in \[0, 2\*\*32\)"):
        Draws(seed, epoch, np.zeros(1), np.zeros(1))
