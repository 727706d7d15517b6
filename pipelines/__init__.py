"""From image files to batches on the device. Knows images only: nothing of models, losses or the trainer."""

from .augmentation import Augmentation
from .bad_files import BadFiles, NoImages, TooManyBadFiles
from .batch import Batch
from .concatenation import WithUnlabelled
from .index import Index, open_files, open_folder, open_index
from .loader import Loader, eval_loader, train_loader
from .mixing import Mix
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
