"""From a batch of uint8 pixels to what student and teacher see."""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from fastdeit.kernels import mix_normalize

from .accumulation import split
from .config import Config

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FIRST = 512  # views on which a teacher is looked at before a run


def precision_of(config: Config, device: torch.device) -> torch.dtype:
    """The student's autocast type, and the type of its images."""
    return PRECISIONS[config.speed.precision or ("bf16" if device.type == "cuda" else "fp32")]


def prepare(batch, mean, std, dtype: torch.dtype) -> Tensor:
    """The batch's images normalised, erased, mixed: (batch, 3, height, width)."""
    mix = {} if batch.mix is None else batch.mix._asdict()
    return mix_normalize(batch.images, mean, std, dtype=dtype, **mix)


def first_views(loader, prepare: Callable, *, parts: int = 1) -> Iterator[Tensor]:
    """The first training images as models see them, in batches, or in the parts of batches that --accumulate makes.

    prepare: of one batch. The loader stands at its beginning afterwards.
    """
    loader.set_epoch(0)
    for batch in islice(loader, -(-FIRST // loader.plans.batch_size)):
        yield from map(prepare, split(batch, parts))
    loader.set_epoch(0)
