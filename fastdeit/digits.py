"""The data of the default run: scikit-learn's 1,797 handwritten digits, written once as an image folder of PNGs."""

import shutil
from pathlib import Path

VAL_SHARE = 0.2
SPLIT_SEED = 0


def digits_folder(root: Path = Path("data/digits")) -> Path:
    """Write root/{train,val}/{0..9}/*.png (8 x 8 pixels, grey) unless it is there; return root.

    The split is stratified with a fixed seed: 1,437 training and 360 validation images, the same on every machine.
    Source: sklearn.load_digits (the test part of the UCI "Optical Recognition of Handwritten Digits" set).
    """
    if root.is_dir():
        return root
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype("uint8")
    train, val = train_test_split(range(len(labels)), test_size=VAL_SHARE, stratify=labels, random_state=SPLIT_SEED)
    # Written beside the target and renamed, so that a folder of this name is always a whole one.
    unfinished = root.with_name(root.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for split, members in (("train", train), ("val", val)):
        for member in members:
            folder = unfinished / split / str(labels[member])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[member]).save(folder / f"{member:04d}.png")
    unfinished.rename(root)
    return root
