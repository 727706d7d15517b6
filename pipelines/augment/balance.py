"""Class-balanced sampling: rare classes drawn more often, a pure function of (seed, epoch) like every order.

    in    labels (n,) int64, negative for none; strength in [0, 1]; how many draws
    out   images (draws,) int64 in random order; times (draws,) int64: which draw of this image it is, from 0

A class of k images is drawn in proportion to k^(1 - strength): 0 is the data as they are, 1 every class as often as any
other, 0.5 square-root sampling (Kang et al., "Decoupling representation and classifier", arXiv 1910.09217, equation 1
with q = 1 - strength). Unlabelled images keep their share. The images of a class are drawn in turn, so that in an epoch
each comes as often as any other of its class, or once more.
"""

import numpy as np


def expected_draws(labels: np.ndarray, strength: float, draws: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(labels that occur, images of each, float64 how many of `draws` each gets on average); they sum to `draws`."""
    values, images = np.unique(labels, return_counts=True)
    known = values >= 0
    share = np.where(known, images.astype(np.float64) ** (1 - strength), images)
    share[known] *= images[known].sum() / max(share[known].sum(), 1)
    return values, images, draws * share / share.sum()


def balanced_draws(
    labels: np.ndarray, *, seed: int, epoch: int, strength: float, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """(images, times) of an epoch. What a class gets of `draws` is its expected number, rounded up or down at random
    such that the sum and, over the epochs, the mean are right."""
    random = np.random.Philox(key=[seed, epoch])  # raw words, whose stream NumPy guarantees
    shuffled = np.lexsort((random.random_raw(len(labels)), labels))  # class after class, each in random order
    place = random.random_raw(draws)
    offset = (int(random.random_raw(1)[0]) >> 32) * 2.0**-32

    _, images, expected = expected_draws(labels, strength, draws)
    ends = np.cumsum(expected)
    ends[-1] = draws
    quota = np.diff(np.floor(ends + offset).astype(np.int64), prepend=0)
    of_class = np.repeat(np.arange(len(images)), quota)
    turn = np.arange(draws) - (np.cumsum(quota) - quota)[of_class]
    first = np.cumsum(images) - images
    drawn = shuffled[first[of_class] + turn % images[of_class]]
    order = np.argsort(place, kind="stable")
    return drawn[order].astype(np.int64), (turn // images[of_class])[order]
