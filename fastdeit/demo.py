"""Data and teacher of a run without --data-path: scikit-learn's 1,797 handwritten digits, written once as a folder of
PNGs, and a small CNN trained on them."""

import shutil
from pathlib import Path

from fastdeit import recipes
from fastdeit.config import in_pixels, listed
from fastdeit.training import run

VAL_FRACTION = 0.2
SPLIT_SEED = 0
TEACHER_EPOCHS = 150  # of two steps each
FEW = 10  # labels a class, where a teacher is to add what the labels do not say


def digits_folder(root: Path = Path("data/digits"), *, labelled: int | None = None) -> Path:
    """Write root/{train,val}/{0..9}/*.png (8 x 8 pixels, grey) unless it is there; return root.

    The split is stratified with a fixed seed: 1,437 training and 360 validation images, the same on every machine.
    labelled: keep so many training images of each class in root/train, and put the others into root/unlabelled
    Source: sklearn.datasets.load_digits (the test part of the UCI "Optical Recognition of Handwritten Digits" set).
    """
    if root.is_dir():
        return root
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype("uint8")
    train, val = train_test_split(range(len(labels)), test_size=VAL_FRACTION, stratify=labels, random_state=SPLIT_SEED)
    # Written beside the target and renamed, so that a folder of this name is always complete.
    unfinished = root.with_name(root.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for split, members in (("train", sorted(train)), ("val", val)):
        seen = [0] * 10
        for member in members:
            label = labels[member]
            seen[label] += 1
            hidden = split == "train" and labelled is not None and seen[label] > labelled
            folder = unfinished / ("unlabelled" if hidden else f"{split}/{label}")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[member]).save(folder / f"{member:04d}.png")
    unfinished.rename(root)
    return root


def with_digits(config, world):
    """The settings of a run; without --data-path with the digits as data. For a student with a teacher only FEW images
    of each class have a label, and the others none; a teacher that is not given is trained on those labels, and kept
    for the next run."""
    if config.data.data_path is not None:
        return config
    config = type(config).from_dict(config.to_dict())
    asked = config.distillation
    if asked.distillation_type == "none":
        config.data.data_path = world.broadcast(digits_folder() if world.is_main else None)
        return config
    root = Path(f"data/digits-{10 * FEW}")
    config.data.data_path = world.broadcast(digits_folder(root, labelled=FEW) if world.is_main else None)
    if asked.unlabelled_path is None:
        asked.unlabelled_path = root / "unlabelled"
    if asked.teacher_path is None and asked.teacher_store is None:
        paths = [str(_teacher(config, world, model)) for model in listed(asked.teacher_model)]
        asked.teacher_path = paths[0] if len(paths) == 1 else tuple(paths)
    return config


def _teacher(config, world, model: str) -> Path:
    """The folder of a finished training run of `model` on the digits."""
    settings = recipes.load("teacher_digits")
    settings.model.model = model
    settings.data.data_path, settings.data.input_size = config.data.data_path, config.data.input_size
    settings.run.device, settings.run.tracker = config.run.device, config.run.tracker
    settings.data.batch_size, settings.run.eval_every = 5 * FEW, TEACHER_EPOCHS // 3
    settings.optimization.epochs, settings.optimization.warmup_epochs = TEACHER_EPOCHS, TEACHER_EPOCHS / 15
    size = in_pixels(settings.data.input_size).replace(" ", "")
    target = Path("runs") / f"digits-{10 * FEW}-teacher-{model}-{size}px"
    if not world.broadcast(target.is_dir()):
        # Trained under another name, so that a folder of this name is always a finished run.
        settings.run.output_dir = target.with_name(target.name + ".unfinished")
        if world.is_main:
            shutil.rmtree(settings.run.output_dir, ignore_errors=True)
            print(f"training the teacher {settings.model.model} on the digits, kept in {target} for the next run")
        run.run(settings, world)
        if world.is_main:
            settings.run.output_dir.rename(target)
            print(f"the teacher is finished: {settings.run.output_dir} is now {target}")
        world.barrier()
    return target
