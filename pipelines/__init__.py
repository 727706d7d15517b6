"""From image files to batches on the device. Knows images only: nothing of models, losses or the trainer."""

from .augment.augmentation import Augmentation
from .augment.mixing import Mix
from .bad_files import BadFiles, NoImages, TooManyBadFiles
from .index.index import Index, open_files, open_folder, open_index
from .index.unlabelled import WithUnlabelled
from .loader import Batch, Loader, eval_loader, train_loader
from .synthetic import SyntheticIndex

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
