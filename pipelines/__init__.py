"""From image files to batches on the device. Knows images only: nothing of models, losses or the trainer."""

from .augmentation import Augmentation
from .index import Index, open_files, open_folder, open_index
from .loader import Batch, Loader, eval_loader, train_loader
from .mixing import Mix

__all__ = [
    "Augmentation",
    "Batch",
    "Index",
    "Loader",
    "Mix",
    "eval_loader",
    "open_files",
    "open_folder",
    "open_index",
    "train_loader",
]
