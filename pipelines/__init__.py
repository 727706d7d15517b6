"""From image files to batches on the device. Knows images only: nothing of models, losses or the trainer."""

from typing import TYPE_CHECKING

from .augment.augmentation import Augmentation
from .bad_files import BadFiles, NoImages, TooManyBadFiles
from .index.index import Index, open_files, open_folder, open_index
from .index.unlabelled import WithUnlabelled

if TYPE_CHECKING:
    from .loader import Batch, Loader, Mix, SyntheticIndex, eval_loader, train_loader

__all__ = [
    "Augmentation",
    "BadFiles",
    "Batch",
    "Index",
    "Loader",
    "Mix",
    "NoImages",
    "SyntheticIndex",
    "TooManyBadFiles",
    "WithUnlabelled",
    "eval_loader",
    "open_files",
    "open_folder",
    "open_index",
    "train_loader",
]


def __getattr__(name: str):
    """What makes batches is imported when it is first used: the commands' --help does not wait for PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import loader

    return getattr(loader, name)
