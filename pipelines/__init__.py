"""From image files to batches on the device. Knows images only: nothing of models, losses or the trainer.

The path of one batch, a file a station:

    index/image_index.py     which images there are, with their labels and sizes
    augment/sampler.py       the order of an epoch: an image for each position of each step and rank
    augment/plan.py          one step: which images, which views of them, how they are mixed
    decode/prefetch.py       from encoded images to uint8 pixels, ahead of their use; by decode/gpu.py or decode/cpu.py
    loader.py                the batch: images, labels, indices and what to mix
"""

from typing import TYPE_CHECKING

from .augment.augmentation import Augmentation
from .augment.balance import expected_draws
from .bad_files import BadFiles, NoImages, TooManyBadFiles, printable
from .held_out import hold_out
from .index.combined import Repeated, WithUnlabelled
from .index.folder import IMAGE_EXTENSIONS, list_files
from .index.image_index import Index, open_classes, open_files, open_folder, open_index
from .index.labels import class_name, natural_order
from .index.layout import name_of_split, read_class_names

if TYPE_CHECKING:
    from .loader import Batch, Loader, Mix, SyntheticIndex, eval_loader, train_loader

__all__ = [
    "IMAGE_EXTENSIONS",
    "Augmentation",
    "BadFiles",
    "Batch",
    "Index",
    "Loader",
    "Mix",
    "NoImages",
    "Repeated",
    "SyntheticIndex",
    "TooManyBadFiles",
    "WithUnlabelled",
    "class_name",
    "eval_loader",
    "expected_draws",
    "hold_out",
    "list_files",
    "name_of_split",
    "natural_order",
    "open_classes",
    "open_files",
    "open_folder",
    "open_index",
    "printable",
    "read_class_names",
    "train_loader",
]


def __getattr__(name: str) -> object:
    """What makes batches is imported when it is first used: --help of the commands need not wait for PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import loader

    return getattr(loader, name)
