"""From a batch of uint8 pixels to what student and teacher see."""

import torch
from torch import Tensor

from fastdeit.kernels import mix_normalize

from .config import Config

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision_of(config: Config, device: torch.device) -> torch.dtype:
    """The student's autocast type, and the type of its images."""
    return PRECISIONS[config.speed.precision or ("bf16" if device.type == "cuda" else "fp32")]


def prepare(batch, mean, std, dtype: torch.dtype) -> Tensor:
    """The batch's images normalised, erased, mixed: (batch, 3, height, width)."""
    mix = {} if batch.mix is None else batch.mix._asdict()
    return mix_normalize(batch.images, mean, std, dtype=dtype, **mix)
