"""Recipes: files with one function, `config()`, whose docstring states the command, the cost and what to expect.

May import: config, errors.
"""

import importlib
import pkgutil

from fastdeit.config import Config
from fastdeit.errors import UserError


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Config:
    """The recipe's settings, as a fresh `Config`."""
    if name not in names():
        raise UserError(f"--recipe {name}: there is no such recipe; choose one of {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}").config()


def describe(name: str) -> str:
    return importlib.import_module(f"{__name__}.{name}").__doc__.strip()


def starts_from_weights(name: str) -> bool:
    """Whether the recipe is one of fine-tuning: its module says so by FINETUNES."""
    return getattr(importlib.import_module(f"{__name__}.{name}"), "FINETUNES", False)
