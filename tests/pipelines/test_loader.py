"""The loaders' contract: what is in a batch, and that it is the same however the work is shared or broken off."""

import gc
import threading
import time

import numpy as np
import pytest
import torch

from fastdeit.pipelines import Augmentation, eval_loader, open_folder, train_loader

pytest.importorskip("nvidia.dali")

PLAIN = Augmentation(aa="none", color_jitter=0, repeats=1)
RAND_SMALL = {"input_size": 48, "augmentation": Augmentation(repeats=1), "seed": 3}


def by_image(loader, epoch=1) -> dict[int, torch.Tensor]:
    """{index: image} of an epoch without repeats."""
    loader.set_epoch(epoch)
    return {int(i): image for batch in loader for i, image in zip(batch.indices, batch.images)}


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[i], theirs[i]) for i in ours)


def test_a_training_batch(photos):
    loader = train_loader(photos, batch_size=16, num_threads=2)
    assert len(loader) == 6
    for count, batch in enumerate(loader, start=1):
        assert batch.images.shape == (16, 224, 224, 3) and batch.images.dtype == torch.uint8
        assert batch.labels.tolist() == photos.labels[batch.indices].tolist()
        partner, lam, box, erase_box, erase_seed = batch.mix
        assert partner.dtype == torch.int64 and partner.tolist() == [i ^ 1 for i in range(16)]
        assert lam.dtype == torch.float32 and lam.shape == (16,) and 0 <= lam[0] < 1
        assert box.dtype == erase_box.dtype == torch.int32 and box.shape == erase_box.shape == (16, 4)
        assert erase_seed.dtype == torch.int64
        assert loader.state_dict() == {"position": count}
    assert count == 6


def test_repeats_give_different_views_in_different_batches(photos):
    loader = train_loader(photos, batch_size=16, augmentation=Augmentation(aa="none", repeats=3), input_size=32)
    seen = {}
    for batch in loader:
        assert len(set(batch.indices.tolist())) == 16
        for i, image in zip(batch.indices.tolist(), batch.images):
            seen.setdefault(i, []).append(image)
    assert sorted({len(views) for views in seen.values()}) == [3]
    assert all(not torch.equal(views[0], views[1]) for views in seen.values())


def test_batch_size_and_threads_do_not_matter(photos):
    reference = by_image(train_loader(photos, batch_size=8, num_threads=1, **RAND_SMALL))
    assert len(reference) == 96
    assert same(reference, by_image(train_loader(photos, batch_size=32, num_threads=4, **RAND_SMALL)))


def test_order_does_not_matter(photos, monkeypatch):
    from fastdeit.pipelines.augment import plan

    reference = by_image(train_loader(photos, batch_size=32, **RAND_SMALL))
    in_order = (np.arange(96), np.zeros(96, np.int64))
    monkeypatch.setattr(plan, "epoch_order", lambda *args, **kwargs: in_order)
    loader = train_loader(photos, batch_size=32, **RAND_SMALL)
    assert same(reference, by_image(loader))
    assert next(iter(loader)).indices.tolist() == list(range(32))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_what_one_process_would_see(photos, world_size, mode):
    settings = dict(input_size=32, augmentation=Augmentation(mixup_mode=mode), seed=1)
    whole = train_loader(photos, batch_size=24, **settings)
    parts = [
        train_loader(photos, batch_size=24 // world_size, rank=rank, world_size=world_size, **settings)
        for rank in range(world_size)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        for field in ("images", "labels", "indices"):
            assert torch.equal(getattr(batch, field), torch.cat([getattr(share, field) for share in shares]))
        for field in ("lam", "box", "erase_box", "erase_seed"):
            assert torch.equal(getattr(batch.mix, field), torch.cat([getattr(share.mix, field) for share in shares]))


def test_resume_in_the_middle(photos):
    def loader():
        return train_loader(photos, batch_size=16, input_size=32)

    first, resumed = loader(), loader()
    first.set_epoch(2)
    batches = []
    for batch in first:
        batches.append(batch)
        if len(batches) == 2:
            saved = first.state_dict()
    resumed.set_epoch(2)
    resumed.load_state_dict(saved)
    rest = list(resumed)
    assert len(rest) == 4
    for ours, theirs in zip(rest, batches[2:]):
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.indices, theirs.indices)
        assert all(torch.equal(a, b) for a, b in zip(ours.mix, theirs.mix))
    with pytest.raises(ValueError, match="cannot resume after 7 batches of an epoch of 6"):
        resumed.load_state_dict({"position": 7})


def test_breaking_off_and_starting_again(photos):
    loader = train_loader(photos, batch_size=16, input_size=32)
    first = [batch.indices.tolist() for batch, _ in zip(loader, range(3))]
    again = [batch.indices.tolist() for batch in loader]
    assert len(again) == 6 and again[:3] == first
    loader.set_epoch(1)
    other = [batch.indices.tolist() for batch in loader]
    assert len(other) == 6 and other != again


def test_epochs_and_seeds_differ(photos):
    def images(seed, epoch):
        return by_image(train_loader(photos, batch_size=32, input_size=32, augmentation=PLAIN, seed=seed), epoch)

    reference = images(0, 0)
    for other in (images(0, 1), images(1, 0)):
        assert reference.keys() == other.keys() and not any(torch.equal(reference[i], other[i]) for i in reference)


def test_a_batch_that_is_kept_is_not_written_to_again(photos):
    loader = train_loader(photos, batch_size=8, input_size=64, augmentation=PLAIN)
    kept = [(batch, batch.images.clone()) for batch in loader]
    for _ in range(2):
        list(loader)
    assert all(torch.equal(batch.images, copy) for batch, copy in kept)
    assert len({batch.images.data_ptr() for batch, _ in kept}) == len(kept)


def test_evaluation_sees_every_image_once_in_equal_steps(photos):
    for world_size, batch_size in ((1, 36), (3, 10)):
        loaders = [
            eval_loader(photos, batch_size=batch_size, input_size=32, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert len({len(loader) for loader in loaders}) == 1
        seen = []
        for loader in loaders:
            for batch in loader:
                assert batch.images.shape == (batch_size, 32, 32, 3) and batch.mix is None
                padding = batch.indices < 0
                assert (batch.labels[padding] == -100).all()
                assert batch.labels[~padding].tolist() == photos.labels[batch.indices[~padding]].tolist()
                seen += batch.indices[~padding].tolist()
        assert sorted(seen) == list(range(96))


def test_images_without_labels(photos):
    folder = photos.path(0).rsplit("/", 1)[0]
    for loader in (eval_loader(open_folder(folder), batch_size=8), train_loader(open_folder(folder), batch_size=8)):
        assert (next(iter(loader)).labels == -100).all()


def test_refused(photos):
    with pytest.raises(ValueError, match="batch_size must be even, got 15"):
        train_loader(photos, batch_size=15)
    assert len(train_loader(photos, batch_size=15, augmentation=Augmentation(mixup=0, cutmix=0))) == 6
    with pytest.raises(ValueError, match="do not fill one batch"):
        train_loader(photos, batch_size=98)
    with pytest.raises(ValueError, match="crop_pct"):
        eval_loader(photos, crop_pct=1.5)


def test_no_thread_outlives_its_loader(tiny):
    before = threading.active_count()
    for _ in range(3):
        next(iter(train_loader(tiny, batch_size=8, input_size=16, augmentation=PLAIN)))
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert threading.active_count() <= before
