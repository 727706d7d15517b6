"""Train, distil, fine-tune and use Data-efficient Image Transformers (DeiT).

run = fastdeit.train(data_path="photos", recipe="finetune")
model = fastdeit.load(run.folder)
model.predict("new/")
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdeit.api import Classifier, Run, load, train

__version__ = "0.1.0"
__all__ = ["Classifier", "Run", "load", "train"]


def __getattr__(name: str) -> object:
    """Imported when first used: the kernels alone need no timm, no DALI, and no second."""
    if name == "train":  # the module of this name, which can be called
        return importlib.import_module("fastdeit.train")
    if name in __all__:
        return getattr(importlib.import_module("fastdeit.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
