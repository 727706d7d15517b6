"""Synthetic images without decoding, to measure all but the data pipeline (`--data-path synthetic`)."""

from collections import deque

import numpy as np
import torch

from .augment.plan import Plan


class SyntheticIndex:
    """An index without files, for train_loader and eval_loader. Labels cycle through the classes."""

    bad = ()

    def __init__(self, images: int = 1_281_167, classes: int = 1000):
        self.classes = tuple(f"class {label}" for label in range(classes))
        self.labels = np.arange(images, dtype=np.int64) % classes
        self.heights = self.widths = np.full(images, 256, np.int32)
        self.fingerprint = f"synthetic {images} {classes}"

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        return f"synthetic:{i}"


class SyntheticDecoder:
    """The same noise on the device for every batch. Mixing and erasing are drawn as for real images."""

    def __init__(self, batch_size: int, size: tuple[int, int], device: torch.device):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (batch_size, *size, 3), dtype=torch.uint8, generator=generator)
        self.images = images.to(device)
        self.fed: deque[int] = deque()

    def feed(self, plan: Plan) -> None:
        self.fed.append(plan.step)

    def start(self) -> None:
        pass

    def collect(self, plan: Plan) -> torch.Tensor:
        assert self.fed.popleft() == plan.step
        return self.images
