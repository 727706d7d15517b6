"""Draw what training sees.

    python -m fastdeit.pipelines.show DIR OUT.png [--aa rand-m9-mstd0.5-inc1]

From the top: an image and each operation of RandAugment at magnitude 9; its views with --aa; a batch as the model gets
it, erased and mixed, with its targets.
"""

from dataclasses import replace

import numpy as np

from . import cli
from .augment.augmentation import Augmentation
from .augment.auto_augment import OPERATIONS, RandAugment
from .augment.operations import Operation
from .bad_files import BadFiles
from .index.image_index import open_index

COLUMNS, SIZE = 8, 224
MEAN, STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])  # ImageNet's


def operations(image: np.ndarray, fill) -> list[tuple[str, np.ndarray]]:
    """The image, then each operation of RandAugment at magnitude 9, signed ones in the positive direction."""
    from .decode.cpu import apply_operations

    ops = np.array(OPERATIONS)
    args = RandAugment.parse("rand-m9-inc1").arguments(ops, np.full(len(ops), 9.0), np.ones(len(ops)))
    cells = [("the image", image)]
    for op, arg in zip(ops.tolist(), args.tolist()):
        name = Operation(op).name.lower().replace("_", " ")
        cells.append((f"{name} {arg:.3g}" if arg else name, apply_operations(image, [op], [arg], fill)))
    return cells


def views(index, i: int, augmentation: Augmentation, count: int, bad_files: BadFiles) -> list[tuple[str, np.ndarray]]:
    """Views of image i in the first epochs."""
    from .loader import train_loader

    only = replace(augmentation, repeats=1, mixup=0.0, cutmix=0.0)
    settings = {"batch_size": 1, "input_size": SIZE, "bad_files": bad_files}
    loader = train_loader(index.take(np.array([i])), augmentation=only, **settings)
    cells = []
    for epoch in range(count):
        loader.set_epoch(epoch)
        cells += [(f"{augmentation.aa}, epoch {epoch}", batch.images[0].numpy()) for batch in loader]
    return cells


def batch(index, augmentation: Augmentation, count: int, bad_files: BadFiles) -> list[tuple[str, np.ndarray]]:
    """A batch after erasing and mixing; mixed elementwise, to show mixup and cutmix."""
    from .loader import train_loader

    elementwise = replace(augmentation, mixup_mode="elem", reprob=0.5)
    settings = {"batch_size": count, "input_size": SIZE, "bad_files": bad_files}
    loader = train_loader(index, augmentation=elementwise, **settings)
    images, labels, _, mix = next(iter(loader))
    pixels = [_erased(*sample) for sample in zip(images.numpy(), mix.erase_box.tolist(), mix.erase_seed.tolist())]
    cells = []
    for own, partner, lam, box in zip(range(count), mix.partner.tolist(), mix.lam.tolist(), mix.box.tolist()):
        y0, x0, y1, x1 = box
        mixed = pixels[own].copy() if y1 else lam * pixels[own] + (1 - lam) * pixels[partner]
        mixed[y0:y1, x0:x1] = pixels[partner][y0:y1, x0:x1]
        names = [index.classes[labels[k]] if labels[k] >= 0 else "?" for k in (own, partner)]
        cells.append((f"{lam:.2f} {names[0]} + {1 - lam:.2f} {names[1]}", mixed))
    return cells


def _erased(image: np.ndarray, box: list[int], seed: int) -> np.ndarray:
    """float64; erased pixels are normal noise in normalized units, as in the kernel, from other random numbers."""
    image = image.astype(np.float64)
    y0, x0, y1, x1 = box
    image[y0:y1, x0:x1] = np.random.default_rng(seed).normal(MEAN, STD, (y1 - y0, x1 - x0, 3))
    return image


def draw(cells: list[tuple[str, np.ndarray]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = -(-len(cells) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(1.7 * COLUMNS, 1.9 * rows), layout="constrained")
    for axis, (title, image) in zip(axes.flat, cells):
        axis.imshow(np.clip(image, 0, 255).astype(np.uint8))
        axis.set_title(title, fontsize=7, parse_math=False)
    for axis in axes.flat:
        axis.axis("off")
    figure.savefig(path, dpi=80)


def show(
    dir: str,
    out: str,
    /,
    split: str = "train",
    image: int = 0,
    aa: str = "rand-m9-mstd0.5-inc1",
    label_column: str | None = None,
) -> None:
    """Draw what training sees: operations, views, and a batch erased and mixed.

    Args:
        dir: The data set: DIR/train/CLASS/*.jpg, tar shards or Parquet files.
        out: The picture to write.
        split: train or val.
        image: Image to show operations and views of, counted from 0.
        aa: none, 3aug (DeiT III), or RandAugment in timm's notation.
        label_column: Label column of Parquet files; by default label, labels, ..., or the one with class names.
    """
    from .loader import eval_loader

    index = open_index(dir, split, label_column=label_column)
    if not 0 <= image < len(index):
        raise ValueError(f"--image {image}: the images are numbered from 0 to {len(index) - 1}")
    augmentation = Augmentation(aa=aa, repeats=1)
    bad_files = BadFiles.of(index, limit=1)  # some bad images do not keep the others from being shown
    loader = eval_loader(index.take(np.array([image])), batch_size=1, input_size=SIZE, bad_files=bad_files)
    pixels = next(iter(loader)).images[0].numpy()
    cells = operations(pixels, augmentation.fill)
    for kind in (aa, "3aug"):
        cells += views(index, image, replace(augmentation, aa=kind), COLUMNS, bad_files)
    cells += batch(index, augmentation, 2 * COLUMNS, bad_files)
    draw(cells, out)


def main() -> None:
    cli.run(show, "python -m fastdeit.pipelines.show", {"dir": "DIR", "out": "OUT.png"})


if __name__ == "__main__":
    main()
