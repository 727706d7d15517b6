"""The loaders survive every bad file, and read every odd one as Pillow does."""

import io
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_images import HEIGHT, WIDTH, bad_by_body, bad_by_header, bits12, encoded, odd_but_good, picture, write
from PIL import Image

from fastdeit.pipelines import (
    Augmentation,
    BadFiles,
    TooManyBadFiles,
    eval_loader,
    open_folder,
    open_index,
    train_loader,
)

pytest.importorskip("nvidia.dali")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Large crops: what is left of a truncated file is decoded where a crop needs no more.
PLAIN = Augmentation(aa="none", color_jitter=0, repeats=1, scale=(0.9, 1.0))
GOOD = 60


@pytest.fixture
def mixed(tmp_path):
    """A folder with good files and all bad ones."""
    write(tmp_path / "train/a", {f"good{n:02d}.jpg": encoded(picture(seed=n)) for n in range(GOOD)})
    write(tmp_path / "train/b", {name: contents for name, (contents, _) in bad_by_header().items()})
    write(tmp_path / "train/b", {f"{n}_{name}": c for n in range(2) for name, c in bad_by_body().items()})
    write(tmp_path / "train/b", {f"good{n:02d}.jpg": encoded(picture(seed=100 + n)) for n in range(GOOD)})
    return tmp_path


def tolerant(index, path=None):
    return BadFiles.of(index, limit=0.5, path=path)


def full_epoch(loader, epoch=0):
    loader.set_epoch(epoch)
    return [(batch.indices.tolist(), batch.images, batch.labels) for batch in loader]


@pytest.mark.parametrize("device", DEVICES)
def test_training_goes_on_and_names_each_bad_file_once(mixed, tmp_path, device):
    index = open_index(mixed)
    shutil.move(index.path(1), mixed / "elsewhere.jpg")  # vanishes after indexing
    Path(index.path(2)).write_bytes(encoded(picture(20, 20)))  # becomes another image
    Path(index.path(3)).write_bytes(b"")
    bad_files = tolerant(index, tmp_path / "bad_files.txt")
    settings = {"batch_size": 16, "input_size": 32, "augmentation": PLAIN, "device": device}
    loader = train_loader(index, bad_files=bad_files, **settings)
    for epoch in range(2):
        for indices, images, labels in full_epoch(loader, epoch):
            assert labels.tolist() == index.labels[indices].tolist()
            assert not any("truncated" in index.name(i) for i in indices) and not {1, 2, 3} & set(indices)
            assert images.shape == (16, 32, 32, 3)
    lines = (tmp_path / "bad_files.txt").read_text().splitlines()
    causes = dict(line.split("\t") for line in lines)
    assert len(causes) == len(lines) == len(bad_files) == len(bad_by_header()) + 4 + 3
    assert causes[index.name(1)] == "cannot be read (No such file or directory)"
    assert causes[index.name(2)] == f"has changed: it was {HEIGHT} x {WIDTH} when it was indexed, now 20 x 20"
    assert causes[index.name(3)] == "empty file"
    assert all(cause.startswith("damaged: ") for name, cause in causes.items() if "0_truncated" in name)


def test_who_takes_the_place_of_a_bad_image_does_not_depend_on_batches_or_threads(mixed):
    index = open_index(mixed)

    def epoch(**settings):
        loader = train_loader(
            index, input_size=32, augmentation=PLAIN, bad_files=tolerant(index), world_size=1, **settings
        )
        batches = full_epoch(loader)
        return [i for indices, *_ in batches for i in indices], torch.cat([images for _, images, _ in batches])

    reference, images = epoch(batch_size=8, num_threads=1)
    for settings in ({"batch_size": 8, "num_threads": 4}, {"batch_size": 4}, {"batch_size": 24}):
        indices, other = epoch(**settings)
        common = min(len(indices), len(reference))
        assert indices[:common] == reference[:common] and torch.equal(images[:common], other[:common])


def test_a_resumed_run_avoids_the_listed_files_from_the_start(mixed, tmp_path):
    index, path = open_index(mixed), tmp_path / "bad_files.txt"
    settings = {"batch_size": 8, "input_size": 32, "augmentation": PLAIN}
    reference = full_epoch(train_loader(index, bad_files=tolerant(index, path), **settings))
    resumed = train_loader(index, bad_files=tolerant(index, path), **settings)
    assert {Path(index.name(i)).name.split("_")[1] for i in resumed.prefetcher.bad} == {
        "truncated.jpg",
        "truncated.tif",
    }
    resumed.load_state_dict({"position": 5})
    for ours, theirs in zip(rest_of_epoch(resumed), reference[5:], strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])


def rest_of_epoch(loader):
    return [(batch.indices.tolist(), batch.images) for batch in loader]


def test_evaluation_counts_no_image_twice(mixed):
    index = open_index(mixed)
    seen = []
    for indices, _, labels in full_epoch(eval_loader(index, batch_size=16, input_size=32, bad_files=tolerant(index))):
        assert [label == -100 for label in labels.tolist()] == [i == -1 for i in indices]
        seen += [i for i in indices if i >= 0]
    assert sorted(seen) == [i for i in range(len(index)) if "truncated" not in index.name(i)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "instead",
    [
        encoded(picture(), "PNG")[:60],  # the size is there, the header is not complete
        encoded(picture(20, 20), "PNG"),  # another image, smaller than the window that is asked for
        bits12(encoded(picture())).replace(b"\x0c\0\x3c\0\x50", b"\x88\0\x3c\0\x50"),  # of 136 bits a sample
    ],
    ids=["cut header", "other image", "header refused by the decoder alone"],
)
def test_what_crashes_the_decoder_in_a_large_batch(tmp_path, instead, device):
    """DALI's decoders alone end in a segmentation fault, in about every second of these epochs."""
    write(tmp_path, {f"{n:03d}.png": encoded(picture(seed=n), "PNG") for n in range(200)})
    index = open_folder(tmp_path)
    write(tmp_path, {f"{n:03d}.png": instead for n in (1, 70, 130, 199)})
    for _ in range(5):
        settings = {"batch_size": 100, "input_size": 32, "num_threads": 2, "device": device}
        loader = eval_loader(index, bad_files=tolerant(index), **settings)
        seen = [i for indices, *_ in full_epoch(loader) for i in indices if i >= 0]
        assert seen == [i for i in range(200) if i not in (1, 70, 130, 199)]
        assert len(loader.bad_files) == 4


def test_too_many_bad_files_stop_the_run(mixed):
    index = open_index(mixed)
    with pytest.raises(TooManyBadFiles, match=r"cannot be read, more than the 12\.10% tolerated"):
        # 17 are found by the index; of the 141 one more makes it too many.
        loader = train_loader(index, batch_size=8, bad_files=BadFiles.of(index, limit=0.121), augmentation=PLAIN)
        list(loader)
    with pytest.raises(TooManyBadFiles):
        train_loader(index)  # 1 % is the default


def test_images_in_shards_that_vanish(mixed):
    class Vanishing:
        """An index whose images are handed over as bytes, as from shards, and one cannot be read."""

        def __init__(self, index):
            self.index = index

        def __getattr__(self, name):
            return getattr(self.index, name)

        def __len__(self):
            return len(self.index)

        def path(self, i):
            return None

        def encoded(self, i):
            if i == 5:
                raise OSError("the shard is gone")
            return self.index.encoded(i)

    index = Vanishing(open_index(mixed))
    bad_files = tolerant(index)
    loader = train_loader(index, batch_size=8, input_size=32, augmentation=PLAIN, bad_files=bad_files)
    assert all(5 not in indices for indices, *_ in full_epoch(loader))
    assert bad_files.causes[index.name(5)] == "cannot be read (the shard is gone)"


@pytest.mark.parametrize("src", [False, True], ids=["evaluation", "simple random crop"])
def test_very_long_images_take_little_memory(tmp_path, src):
    shapes = {"wide": (1, 20_000), "tall": (20_000, 1), "strip": (3, 30_000), "plain": (300, 400)}
    write(tmp_path, {f"{name}.png": encoded(picture(*shape), "PNG") for name, shape in shapes.items()})
    index = open_folder(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if src:
        loader = train_loader(index, batch_size=4, augmentation=replace(PLAIN, src=True))
    else:
        loader = eval_loader(index, batch_size=4)
    (batch,) = loader
    assert batch.images.shape == (4, 224, 224, 3) and len(loader.bad_files) == 0
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 300 * 1024  # 15 GB if the 20,000 pixels are resized to 224 or 256 a piece


@pytest.mark.parametrize("device", DEVICES)
def test_odd_images_are_read_as_pillow_does(tmp_path, device):
    write(tmp_path, odd_but_good())
    index = open_folder(tmp_path)
    loader = eval_loader(index, batch_size=len(index), input_size=HEIGHT, crop_pct=1.0, device=device)
    (batch,) = loader
    assert len(loader.bad_files) == 0 and (batch.indices >= 0).all()
    left = (WIDTH - HEIGHT) // 2
    for i, image in zip(batch.indices.tolist(), batch.images.cpu().numpy()):
        name = Path(index.name(i)).name
        with Image.open(io.BytesIO(index.encoded(i))) as opened:
            expected = np.asarray(opened.convert("RGB"))[:, left : left + HEIGHT].astype(int)
        if name == "deep.png":  # 16 bits: Pillow cuts off at 255, DALI scales to 8 bits
            expected = np.asarray(picture().convert("L").convert("RGB"))[:, left : left + HEIGHT].astype(int)
        error = np.abs(image - expected)
        assert error.max() <= 1 if device == "cpu" else error.mean() <= 2, name
