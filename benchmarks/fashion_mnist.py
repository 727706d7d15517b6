"""Fashion-MNIST as image folders: training sets of several sizes, each part of the next, images without labels, the
10,000 test images, and a set to choose settings on.

The images (28 x 28 pixels, grey, 10 classes, 60,000 + 10,000; github.com/zalandoresearch/fashion-mnist, MIT licence)
are read from Debian's package dataset-fashion-mnist, from a folder with the four files of that name, or downloaded by
torchvision.
"""

import gzip
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from fastdeit.errors import UserError

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SIZES = (1_000, 5_000, 20_000)  # training images
CHOICE, UNLABELLED = 5_000, 20_000  # images to choose settings on, and without labels: none of them in a training set


def source(folder: Path | None) -> Path:
    """Where the four files are: in `folder`, in Debian's package, or where torchvision puts its download."""
    for candidate in [folder] if folder is not None else [DEBIAN, Path("data/FashionMNIST/raw")]:
        if (candidate / "train-images-idx3-ubyte.gz").is_file():
            return candidate
    if folder is not None:
        raise UserError(f"{folder}: there is no train-images-idx3-ubyte.gz in it")
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST("data", download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"Fashion-MNIST could not be downloaded ({error}): install Debian's package dataset-fashion-mnist, or give "
            "a folder with its four files as --fashion-mnist"
        ) from error
    return Path("data/FashionMNIST/raw")


def read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """part: train or t10k. Returns (images, 28, 28) uint8 and (images,) uint8 labels."""
    images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def balanced_order(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """A random order of which each ten consecutive images hold each class once, as long as there are enough."""
    random = np.random.default_rng(seed)
    by_class = [random.permutation(np.flatnonzero(labels == label)) for label in range(len(CLASSES))]
    shortest = min(map(len, by_class))
    return np.stack([members[:shortest] for members in by_class], axis=1).ravel()


def write(root: Path, given: Path | None = None) -> Path:
    """Write ROOT/{1000,5000,20000}/{train,val}/CLASS/*.png, val being the test images; ROOT/choice-N, whose val is
    CHOICE other training images; and ROOT/unlabelled/*.png. Returns root; nothing is done where it is there."""
    if root.is_dir():
        return root
    files = source(given)
    images, labels = read(files, "train")
    test = read(files, "t10k")
    order = balanced_order(labels)
    largest = max(SIZES)
    choice, unlabelled = order[largest : largest + CHOICE], order[largest + CHOICE :][:UNLABELLED]
    unfinished = root.with_name(root.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    _save(unfinished / "test", *test)
    _save(unfinished / "choice", images[choice], labels[choice])
    (unfinished / "unlabelled").mkdir()
    for number, image in enumerate(images[unlabelled]):
        Image.fromarray(image).save(unfinished / "unlabelled" / f"{number:05d}.png")
    for size in SIZES:
        for name, val in ((str(size), "test"), (f"choice-{size}", "choice")):
            members = order[:size]
            _save(unfinished / name / "train", images[members], labels[members])
            (unfinished / name / "val").symlink_to(f"../{val}")
    unfinished.rename(root)
    return root


def _save(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for number, (image, label) in enumerate(zip(images, labels)):
        Image.fromarray(image).save(folder / CLASSES[label] / f"{number:05d}.png")
