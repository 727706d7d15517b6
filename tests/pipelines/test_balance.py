"""Class-balanced orders: how often each class, each image and each view comes; the same for any number of processes."""

import numpy as np
import pytest

from fastdeit.pipelines import Augmentation, SyntheticIndex, train_loader
from fastdeit.pipelines.augment.balance import expected_draws
from fastdeit.pipelines.augment.sampler import epoch_order
from fastdeit.pipelines.index.labels import UNLABELLED

LABELS = np.repeat([0, 1, 2, 3], [900, 90, 9, 1])  # in a class of one, every draw is the same image


def order(strength, *, epoch=0, repeats=1, labels=LABELS, **more):
    return epoch_order(len(labels), seed=3, epoch=epoch, repeats=repeats, labels=labels, class_balance=strength, **more)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_a_class_of_k_images_comes_in_proportion_to_a_power_of_k(strength, repeats):
    """k^(1 - strength), exactly on average and up to one draw in each epoch."""
    share = np.array([900, 90, 9, 1]) ** (1 - strength)
    expected = 1000 * share / share.sum()
    counts = np.array(
        [np.bincount(LABELS[order(strength, epoch=e, repeats=repeats)[0]], minlength=4) for e in range(60)]
    )
    assert (counts.sum(1) == 1000).all()
    assert (np.abs(counts - expected) <= repeats + 1).all()  # the cut at the end may cost some copies
    assert counts.mean(0) == pytest.approx(expected, abs=repeats * 0.5)


def test_the_values():
    """Two classes of 8 and 2 images, ten draws, at half strength: sqrt(8) : sqrt(2) is 2 : 1."""
    labels = np.repeat([0, 1], [8, 2])
    values, images, draws = expected_draws(labels, 0.5, 9)
    assert values.tolist() == [0, 1] and images.tolist() == [8, 2] and draws == pytest.approx([6, 3])
    assert expected_draws(labels, 1.0, 10)[2].tolist() == [5, 5] and expected_draws(labels, 0.0, 10)[2].tolist() == [
        8,
        2,
    ]


def test_the_images_of_a_class_take_turns():
    indices, times = order(1.0)
    counts = np.bincount(indices, minlength=1000)
    assert counts[:900].max() == 1 and 249 <= counts[:900].sum() <= 251
    assert set(counts[900:990]) == {2, 3} and set(counts[990:999]) <= {27, 28} and 249 <= counts[999] <= 251
    another = np.bincount(order(1.0, epoch=1)[0], minlength=1000)
    assert 30 < (counts[:900] * another[:900]).sum() < 120, "another part of a large class in each epoch"  # 69 expected
    assert [sorted(times[indices == i]) for i in (999, 0)] == [list(range(counts[999])), list(range(counts[0]))]


@pytest.mark.parametrize("repeats", [2, 3])
@pytest.mark.parametrize("global_batch", [None, 64])
def test_no_view_comes_twice(repeats, global_batch):
    """Every draw of an image has a copy number, hence an augmentation, of its own."""
    pairs = list(zip(*(part.tolist() for part in order(1.0, repeats=repeats, global_batch=global_batch))))
    assert len(set(pairs)) == len(pairs) == 1000
    assert max(copy for image, copy in pairs if image == 999) >= 200


def test_the_order_is_random_and_reproducible():
    first, again, next_epoch = order(1.0), order(1.0), order(1.0, epoch=1)
    assert all(map(np.array_equal, first, again)) and not np.array_equal(first[0], next_epoch[0])
    labels = LABELS[first[0]]
    in_parts = [np.bincount(part, minlength=4) for part in np.split(labels, 10)]  # 25 of each expected, deviation 4
    assert 8 < np.min(in_parts) and np.max(in_parts) < 45


def test_unlabelled_images_keep_their_share():
    labels = np.concatenate([LABELS, np.full(500, UNLABELLED)])
    counts = dict(zip(*np.unique(labels[order(1.0, labels=labels)[0]], return_counts=True)))
    assert counts.keys() == {UNLABELLED, 0, 1, 2, 3} and counts[UNLABELLED] in (499, 500, 501)
    assert all(abs(counts[label] - 250) <= 1 for label in range(4))


def test_without_it_the_order_is_the_former():
    plain = epoch_order(1000, seed=3, epoch=2, repeats=3, global_batch=64)
    assert all(map(np.array_equal, order(0.0, epoch=2, repeats=3, global_batch=64), plain))


def test_processes_share_the_same_steps():
    """Four processes of 8 see what one of 32 sees, with the same views; a loader resumes within an epoch."""
    index = SyntheticIndex(images=1000, classes=4)
    index.labels = LABELS
    settings = {"augmentation": Augmentation(class_balance=1.0), "seed": 5, "input_size": 8}
    one = train_loader(index, batch_size=32, **settings)
    four = [train_loader(index, batch_size=8, rank=rank, world_size=4, **settings) for rank in range(4)]
    for step in range(len(one)):
        whole, parts = one.plans[step], [loader.plans[step] for loader in four]
        for name in ("indices", "copies", "lam"):
            assert np.array_equal(getattr(whole, name), np.concatenate([getattr(part, name) for part in parts]))
    seen = [batch.indices.numpy() for batch in one]
    one.load_state_dict({"position": 20})
    assert all(map(np.array_equal, [batch.indices.numpy() for batch in one], seen[20:]))
    assert 180 < sum((LABELS[part] == 3).sum() for part in seen) < 260


def test_out_of_bounds():
    with pytest.raises(ValueError, match="class_balance must be in"):
        Augmentation(class_balance=1.5)
