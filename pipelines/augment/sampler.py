"""The order of the images in an epoch: pure functions of (seed, epoch), with no state to save.

    in    n images, seed, epoch, repeats; batch_size, rank, world_size
    out   indices (n,) int64 and copies (n,) int64 of the epoch; the slice of them that a rank sees in a step

The order is global, for all ranks. With the global batch G = batch_size * world_size, step s has its positions
[s * G, (s + 1) * G), of which rank k takes batch_size from s * G + k * batch_size on. So a step has the same images on
one GPU with batch 1024 as on eight with batch 128, and to resume, the number of the step is enough.

Training drops the incomplete last batch. Evaluation pads it with -1: every image is seen exactly once over all
ranks, and all ranks take the same number of steps.
"""

import numpy as np

from .balance import balanced_draws


def epoch_order(
    n: int,
    *,
    seed: int,
    epoch: int,
    repeats: int = 1,
    shuffle: bool = True,
    global_batch: int | None = None,
    labels: np.ndarray | None = None,
    class_balance: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """The global order of one epoch: (indices, copies), both (n,) int64.

    repeats: repeated augmentation (Hoffer et al., "Augment Your Batch", 2020; DeiT's samplers.py). Each of about
        n / repeats distinct images occurs `repeats` times, numbered by `copies` 0..repeats-1 so that each copy draws
        its own augmentation; the epoch keeps its length n, and another subset is drawn in the next epoch.
    global_batch: sets the distance between the copies of an image. In DeiT they are in one global batch, on different
        GPUs, or on a single GPU in one batch. Here no batch of up to this size contains an image twice, and the
        copies are in consecutive batches, where the optimizer's momentum still averages over them.
        None: as far apart as the epoch allows, which suits any batch size but loses that averaging.
        With fewer than about G distinct images in the epoch they are closer, evenly spaced.
    labels, class_balance: see balance.py, whose `strength` is class_balance; 0 draws each image once. An image that is
        drawn t times has the copies 0..t*repeats-1, and may come twice in a batch.
    """
    _check_order(n, repeats)
    drawn = -(-n // repeats)
    if class_balance > 0:
        assert shuffle and labels is not None
        images, times = balanced_draws(labels, seed=seed, epoch=epoch, strength=class_balance, draws=drawn)
    else:
        images = (_permutation(n, seed, epoch) if shuffle else np.arange(n)).astype(np.int64, copy=False)[:drawn]
        times = np.zeros(drawn, np.int64)
    if repeats == 1:
        return images, times
    shift = _rows_between_copies(len(images), repeats, global_batch)
    # Row j: copy 0 of image j, copy 1 of image j - shift, copy 2 of image j - 2 * shift ... (cyclic). Read row by
    # row, two successive copies of an image are shift * repeats + 1 positions apart.
    rows = np.stack([np.roll(images, copy * shift) for copy in range(repeats)], axis=1)
    copies = np.stack([np.roll(times, copy * shift) * repeats + copy for copy in range(repeats)], axis=1)
    return rows.reshape(-1)[:n], copies.reshape(-1)[:n]


def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """0..n-1 shuffled, by sorting raw Philox words: NumPy guarantees their stream over its versions, unlike that of
    permutation(), and a run must resume in the same order with another version."""
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed and epoch must not be negative, got seed={seed}, epoch={epoch}")
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(n), kind="stable")


def _check_order(n: int, repeats: int) -> None:
    if n < 1:
        raise ValueError("there are no images to order: the index is empty")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1 (1 means no repeated augmentation), got {repeats}")


def _rows_between_copies(rows: int, repeats: int, global_batch: int | None) -> int:
    evenly = rows // repeats
    return evenly if global_batch is None else min(-(-global_batch // repeats), evenly)


def evaluation_order(n: int, batch_size: int, world_size: int = 1) -> np.ndarray:
    """0..n-1 in order, padded with -1 to a multiple of the global batch; int64."""
    padded = np.full(
        steps_per_epoch(n, batch_size, world_size, drop_last=False) * batch_size * world_size, -1, np.int64
    )
    padded[:n] = np.arange(n)
    return padded


def steps_per_epoch(n: int, batch_size: int, world_size: int = 1, *, drop_last: bool = True) -> int:
    """Steps every rank takes in an epoch of n positions: n // G in training (drop_last), ceil(n / G) in evaluation."""
    if batch_size < 1 or world_size < 1:
        raise ValueError(f"batch_size and world_size must be at least 1, got {batch_size} and {world_size}")
    global_batch = batch_size * world_size
    if not drop_last:
        return -(-n // global_batch)
    if n < global_batch:
        raise ValueError(
            f"{n} training images do not fill one batch of {global_batch} (batch size {batch_size} on {world_size} "
            f"processes): use a batch size of at most {max(1, n // world_size)}"
        )
    return n // global_batch


def batch_slice(step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> slice:
    """The positions of the global order that `rank` sees in `step`."""
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    start = step * batch_size * world_size + rank * batch_size
    return slice(start, start + batch_size)
