"""Crops against torchvision's: the same distribution in training, the same pixels in evaluation."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import create_transform
from torchvision import transforms

from fastdeit.pipelines.augment import crop
from fastdeit.pipelines.augment.draws import Draws, Purpose, integers
from fastdeit.pipelines.decode.cpu import resized_view

N = 20_000
LARGEST = 256 * 8 * 256  # pixels of a resized image at 224
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def draws(n, seed=0):
    return Draws(seed, 0, np.arange(n), np.zeros(n))


def theirs(height, width, n=N):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    return np.array([transforms.RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(n)])


@pytest.mark.parametrize("height, width", [(375, 500), (500, 200), (300, 330)])
def test_random_resized_crop_is_distributed_as_torchvisions(height, width):
    ours = crop.random_resized_crop(draws(N), np.full(N, height), np.full(N, width), 224, SCALE, RATIO).window
    reference = theirs(height, width)
    top, left, h, w = ours.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()

    def views_of(windows):
        y, x, h, w = windows.T
        room_y, room_x = np.maximum(height - h, 1), np.maximum(width - w, 1)
        return {"area": h * w, "aspect": w / h, "height": h, "width": w, "y": y / room_y, "x": x / room_x}

    for name, values in views_of(ours).items():
        assert stats.ks_2samp(values, views_of(reference)[name]).pvalue > 0.01, name


@pytest.mark.parametrize("height, width", [(20, 2000), (2000, 20)])
def test_fallback_is_torchvisions(height, width):
    """Windows of these ratios fit so seldom that ten tries often fail."""
    ours = crop.random_resized_crop(draws(2000), np.full(2000, height), np.full(2000, width), 224, (0.5, 1.0), RATIO)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    expected = transforms.RandomResizedCrop.get_params(image, [0.5, 1.0], list(RATIO))
    assert {tuple(window) for window in ours.window.tolist()} == {expected}


def test_images_of_different_sizes_do_not_disturb_each_other():
    random = np.random.default_rng(0)
    heights, widths = random.integers(8, 600, 64), random.integers(8, 600, 64)
    together = crop.random_resized_crop(draws(64), heights, widths, 224, SCALE, RATIO)
    for i in range(64):
        one = Draws(0, 0, np.array([i]), np.array([0]))
        alone = crop.random_resized_crop(one, heights[i : i + 1], widths[i : i + 1], 224, SCALE, RATIO)
        assert np.array_equal(alone.window[0], together.window[i])


@pytest.mark.parametrize("height, width", [(20, 2000), (2000, 20), (1, 900), (3, 901), (300, 4000), (21, 2017)])
@pytest.mark.parametrize("make", ["evaluation", "simple"])
@pytest.mark.parametrize("size", [(32, 32), (28, 42)])
def test_the_view_of_a_long_image_is_that_of_the_whole_image(make, height, width, size):
    shape = np.array([height]), np.array([width])
    if make == "evaluation":
        geometry = crop.evaluation_crop(*shape, size, 0.875)
        resized, side, _ = crop.resized_to_cover(tuple(int(one / 0.875) for one in size), *shape)
        corner = np.rint((resized - size) / 2).astype(np.int64)
    else:
        geometry = crop.simple_random_crop(draws(1, seed=height), *shape, size)
        resized, side, _ = crop.resized_to_cover(size, *shape)
        room = resized + 2 * crop.PADDING - np.array(size) + 1
        corner = integers(draws(1, seed=height).uniform(Purpose.CROP, 2), room) - crop.PADDING
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BICUBIC)))
    top, left, h, w = geometry.window[0].tolist()
    ours = resized_view(
        pixels[top : top + h, left : left + w], *geometry.resized.tolist(), *geometry.corner.tolist(), size
    )
    expected = resized_view(pixels, *resized.tolist(), *corner.tolist(), size)
    error = (ours.int() - expected.int()).abs()
    assert geometry.resized.max() <= crop.LONG * 60 and h * w < height * width
    whole_number = (resized * side % np.stack(shape, 1) == 0).all()
    assert error.max() <= (1 if whole_number else 8)  # which pixels are off by less than one place


def test_no_shape_takes_gigabytes():
    sides = np.array([1, 2, 3, 10, 223, 224, 225, 1000, 20_000, 178_000_000])
    heights, widths = (grid.ravel() for grid in np.meshgrid(sides, sides))
    possible = heights * widths <= 178_956_970
    shape = heights[possible], widths[possible]
    for geometry in (
        crop.evaluation_crop(*shape, 224, 0.875),
        crop.simple_random_crop(draws(len(shape[0])), *shape, 224),
        crop.random_resized_crop(draws(len(shape[0])), *shape, 224, SCALE, RATIO),
    ):
        assert geometry.resized.prod(1).max() <= LARGEST
        top, left, h, w = geometry.window.T
        assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
        assert (top + h <= shape[0]).all() and (left + w <= shape[1]).all()
        inside = geometry.corner + 224 <= geometry.resized + crop.PADDING
        assert inside.all() and (geometry.corner >= -crop.PADDING).all()


def test_simple_random_crop_reaches_every_corner_and_no_further():
    heights, widths = np.full(N, 300), np.full(N, 451)
    geometry = crop.simple_random_crop(draws(N), heights, widths, 224)
    assert np.unique(geometry.resized, axis=0).tolist() == [[224, 336]]
    top, left = geometry.corner.T
    assert (top.min(), top.max(), left.min(), left.max()) == (-4, 4, -4, 336 + 4 - 224)
    assert stats.chisquare(np.bincount(top + 4)).pvalue > 0.01
    assert stats.chisquare(np.bincount(left + 4)).pvalue > 0.01


def test_evaluation_crop_is_torchvisions():
    random = np.random.default_rng(0)
    for size, crop_pct in [(224, 0.875), (224, 1.0), (16, 0.9), (384, 1.0), (192, 0.95)]:
        sizes = random.integers(120, 700, (40, 2))
        geometry = crop.evaluation_crop(sizes[:, 0], sizes[:, 1], size, crop_pct)
        resize = transforms.Resize(int(size / crop_pct))
        for (height, width), resized, corner in zip(
            sizes.tolist(), geometry.resized.tolist(), geometry.corner.tolist()
        ):
            image = resize(Image.new("L", (width, height)))
            assert [image.height, image.width] == resized
            ys, xs = np.mgrid[: image.height, : image.width].astype(np.float32)
            centre = transforms.CenterCrop(size)(torch.from_numpy(np.stack([ys, xs])))
            assert centre.shape == (2, size, size) and centre[:, 0, 0].tolist() == corner


@pytest.mark.parametrize("size, crop_pct", [((192, 256), 0.875), ((96, 64), 1.0), ((224, 160), 0.9)])
def test_evaluation_crop_of_a_rectangle_is_timms(size, crop_pct):
    """timm.data.create_transform: ResizeKeepRatio to cover size / crop_pct, then CenterCrop."""
    transform = create_transform((3, *size), crop_pct=crop_pct, interpolation="bicubic")
    resize = transform.transforms[0]
    sizes = np.random.default_rng(0).integers(120, 700, (60, 2))
    geometry = crop.evaluation_crop(sizes[:, 0], sizes[:, 1], size, crop_pct)
    for (height, width), resized, corner in zip(sizes.tolist(), geometry.resized.tolist(), geometry.corner.tolist()):
        image = resize(Image.new("L", (width, height)))
        assert [image.height, image.width] == resized
        ys, xs = np.mgrid[: image.height, : image.width].astype(np.float32)
        centre = transforms.CenterCrop(size)(torch.from_numpy(np.stack([ys, xs])))
        assert centre.shape == (2, *size) and centre[:, 0, 0].tolist() == corner


def test_one_number_is_a_square():
    shape = np.array([300, 40, 900]), np.array([200, 500, 31])
    for made in (
        lambda size: crop.evaluation_crop(*shape, size, 0.875),
        lambda size: crop.simple_random_crop(draws(3), *shape, size),
        lambda size: crop.random_resized_crop(draws(3), *shape, size, SCALE, RATIO),
    ):
        assert all(map(np.array_equal, made(32), made((32, 32))))
    assert crop.random_resized_crop(draws(3), *shape, (32, 48), SCALE, RATIO).resized.tolist() == [[32, 48]] * 3
