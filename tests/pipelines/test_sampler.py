"""The order of an epoch: a permutation, reproducible, independent of the number of processes, copies kept apart."""

import numpy as np
import pytest

from fastdeit.pipelines.augment import sampler


def test_order_is_a_reproducible_permutation():
    indices, copies = sampler.epoch_order(1000, seed=3, epoch=5)
    again, _ = sampler.epoch_order(1000, seed=3, epoch=5)
    assert indices.dtype == copies.dtype == np.int64
    assert np.array_equal(np.sort(indices), np.arange(1000))
    assert np.array_equal(indices, again)
    assert not copies.any()


def test_the_order_is_that_of_earlier_versions():
    """A change here breaks the resuming of every run: the order of 8 images by 64-bit words of Philox4x64-10."""
    assert sampler.epoch_order(8, seed=3, epoch=5)[0].tolist() == [0, 6, 2, 1, 3, 4, 7, 5]


def test_epochs_and_seeds_are_unrelated():
    orders = [sampler.epoch_order(20_000, seed=s, epoch=e)[0] for s, e in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    for i in range(4):
        for j in range(i):
            # correlation of two random permutations of 20,000: standard deviation 0.007
            assert abs(np.corrcoef(orders[i], orders[j])[0, 1]) < 0.035


def test_no_shuffle_keeps_the_index_order():
    assert np.array_equal(sampler.epoch_order(10, seed=0, epoch=4, shuffle=False)[0], np.arange(10))


@pytest.mark.parametrize("repeats", [2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 7, 1000, 1001, 1002])
@pytest.mark.parametrize("global_batch", [None, 1, 8, 64, 5000])
def test_each_chosen_image_comes_with_all_its_copies(n, repeats, global_batch):
    indices, copies = sampler.epoch_order(n, seed=0, epoch=0, repeats=repeats, global_batch=global_batch)
    assert len(indices) == len(copies) == n
    seen = set(zip(indices.tolist(), copies.tolist()))
    assert len(seen) == n, "an (image, copy) pair comes twice"
    assert len(np.unique(indices)) <= -(-n // repeats)
    counts = np.bincount(indices, minlength=n)
    assert counts.max() <= repeats
    assert (counts[counts > 0] < repeats).sum() < repeats, "only the cut at the end may cost an image copies"


@pytest.mark.parametrize("repeats", [2, 3, 5])
@pytest.mark.parametrize("batch", [32, 100, 256])
@pytest.mark.parametrize("known", [True, False])
def test_no_batch_holds_an_image_twice(repeats, batch, known):
    indices, _ = sampler.epoch_order(10_007, seed=1, epoch=2, repeats=repeats, global_batch=batch if known else None)
    for start in range(0, len(indices) - batch, 97):  # any alignment, not only that of the batches
        assert len(np.unique(indices[start : start + batch])) == batch


def test_copies_fall_into_consecutive_batches():
    indices, copies = sampler.epoch_order(9_000, seed=1, epoch=2, repeats=3, global_batch=100)
    batch_of = np.full((9_000, 3), -1)
    batch_of[indices, copies] = np.arange(9_000) // 100
    drawn = batch_of[batch_of[:, 0] >= 0]
    assert (((drawn[:, 1] - drawn[:, 0]) % 90 >= 1) & ((drawn[:, 1] - drawn[:, 0]) % 90 <= 2)).all()


def test_a_batch_larger_than_the_distinct_images_holds_no_more_copies_than_needed():
    indices, _ = sampler.epoch_order(300, seed=0, epoch=0, repeats=3)  # 100 distinct images
    for start in range(0, 300 - 150):
        assert np.bincount(indices[start : start + 150]).max() <= 2


def test_repeats_draw_another_subset_each_epoch():
    first, second = (np.unique(sampler.epoch_order(3000, seed=0, epoch=e, repeats=3)[0]) for e in (0, 1))
    assert 200 < len(np.intersect1d(first, second)) < 470  # 333 expected of 1000


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(world_size):
    indices, _ = sampler.epoch_order(1000, seed=0, epoch=0)
    batch_size = 48 // world_size
    steps = sampler.steps_per_epoch(1000, batch_size, world_size)
    assert steps == 1000 // 48
    for step in range(steps):
        parts = [indices[sampler.batch_slice(step, batch_size, rank, world_size)] for rank in range(world_size)]
        assert np.array_equal(np.concatenate(parts), indices[step * 48 : (step + 1) * 48])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 5, 32, 33, 100])
def test_evaluation_sees_each_image_once_with_equal_steps(n, world_size):
    order = sampler.evaluation_order(n, 8, world_size)
    steps = sampler.steps_per_epoch(n, 8, world_size, drop_last=False)
    ranks = [
        [order[sampler.batch_slice(step, 8, rank, world_size)] for step in range(steps)] for rank in range(world_size)
    ]
    assert all(len(batch) == 8 for batches in ranks for batch in batches)
    seen = np.concatenate([np.concatenate(batches) for batches in ranks])
    assert np.array_equal(np.sort(seen[seen >= 0]), np.arange(n))


def test_too_few_images_for_one_batch_says_what_to_do():
    with pytest.raises(ValueError, match="use a batch size of at most 25"):
        sampler.steps_per_epoch(50, 64, 2)


def test_an_empty_index_is_refused():
    with pytest.raises(ValueError, match="no images"):
        sampler.epoch_order(0, seed=0, epoch=0)
