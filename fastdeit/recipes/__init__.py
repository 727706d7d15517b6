"""Recipes: a function each, whose docstring states the command, the cost and what to expect: --recipe NAME --help.

May import: config, errors.
"""

import inspect

from fastdeit.config import Config
from fastdeit.errors import UserError

from .deit import (
    deit_base,
    deit_base_384,
    deit_base_distilled,
    deit_base_distilled_384,
    deit_small,
    deit_small_distilled,
    deit_small_distilled_fast,
    deit_small_fast,
    deit_tiny,
    deit_tiny_distilled,
)  # fmt: skip
from .deit3 import deit3_base, deit3_finetune, deit3_large, deit3_small
from .demo import demo, teacher_digits
from .finetune import finetune
from .teacher import teacher

TO_ANOTHER_SIZE = (deit_base_384, deit_base_distilled_384, deit3_finetune)
FINE_TUNING = (finetune, *TO_ANOTHER_SIZE)
FROM_SCRATCH = (
    demo, deit_tiny, deit_small, deit_base, deit_tiny_distilled, deit_small_distilled, deit_base_distilled, deit3_small,
    deit3_base, deit3_large, deit_small_fast, deit_small_distilled_fast, teacher, teacher_digits,
)  # fmt: skip
PAPER_BATCHES = {
    1024: (deit_tiny, deit_small, deit_base, deit_tiny_distilled, deit_small_distilled, deit_base_distilled),
    4096: (deit_small_fast, deit_small_distilled_fast),
    2048: (deit3_small, deit3_base, deit3_large),
    512: TO_ANOTHER_SIZE,
}
RECIPES = {recipe.__name__: recipe for recipe in (*FROM_SCRATCH, *FINE_TUNING)}


def names() -> list[str]:
    return sorted(RECIPES)


def load(name: str) -> Config:
    """The recipe's settings, as a new `Config`."""
    if name not in RECIPES:
        raise UserError(f"--recipe {name}: there is no such recipe; choose one of {', '.join(names())}")
    return RECIPES[name]()


def paper_batch(name: str | None) -> int | None:
    """Images a step, over all processes, in the paper or the original's README that the recipe is after."""
    return next((batch for batch, those in PAPER_BATCHES.items() if RECIPES.get(name or "") in those), None)


def describe(name: str) -> str:
    """What the recipe is for, its command, its cost, what to expect."""
    return inspect.getdoc(RECIPES[name])


def starts_from_weights(name: str) -> bool:
    """Whether the recipe is refused without trained weights to start from."""
    return RECIPES[name] in FINE_TUNING


def changes_size(name: str) -> bool:
    """Whether it fine-tunes at another image size than the weights were trained at."""
    return RECIPES[name] in TO_ANOTHER_SIZE
