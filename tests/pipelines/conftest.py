import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from fastdeit.pipelines import open_index

CLASSES, PER_CLASS = 4, 24


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """An index of 96 JPEGs cut from two photographs, 280 to 500 pixels a side, in 4 classes."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(CLASSES * PER_CLASS):
        photo = Image.fromarray(load_sample_images().images[number % 2])
        width, height = int(random.integers(280, 500)), int(random.integers(280, 400))
        left, top = int(random.integers(photo.width - width)), int(random.integers(photo.height - height))
        folder = root / "train" / f"class{number % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        photo.crop((left, top, left + width, top + height)).save(folder / f"{number:03d}.jpg", quality=92)
    return open_index(root)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """An index of 100 grey 8 x 8 PNGs, all different, in 2 classes."""
    root = tmp_path_factory.mktemp("tiny")
    random = np.random.default_rng(1)
    for number in range(100):
        folder = root / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(folder / f"{number:03d}.png")
    return open_index(root)
