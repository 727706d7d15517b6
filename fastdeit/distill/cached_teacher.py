"""Training from a logit cache: each batch comes with the teacher's targets, and no teacher is in memory.

Epoch e trains on epoch e mod V of the cache's V: its order and pixels are those of epoch e mod V with a live teacher.
Whether this run draws the same pixels is checked before it starts: data, augmentation and the versions of what decodes
and resizes must be the cache's, and the first images must equal those that the teacher saw.
"""

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdeit.config import Config, Distillation, size_of
from fastdeit.curriculum import Curriculum
from fastdeit.data import precision_of, prepare
from fastdeit.distributed.world import World
from fastdeit.errors import UserError
from fastdeit.pipelines import Loader, Mix

from .logit_cache import LogitCache, differences

PROBE = 8  # images
CLOSE = 0.02  # mean difference of the probe on a GPU, in standard deviations: a few levels of 255 in some pixels
PIXEL_LIBRARIES = {"cpu": ("nvidia-dali", "torch", "pillow"), "cuda": ("nvidia-dali",)}


class BatchWithTargets(NamedTuple):
    """A `Batch` and the teacher's targets: (B,) int64 labels, or (classes (B, K) int64, probabilities (B, K))."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    mix: Mix | None
    targets: Any


class CachedTeacher:
    """Replaces a live teacher in the trainer."""

    def __init__(self, cache: LogitCache, config: Config):
        self.cache, self.epochs, self.name = cache, Curriculum.of(config).epochs, f"of the logit cache {cache.folder}"
        self.fingerprint = cache.fingerprint

    def __call__(self, images: Tensor, batch: BatchWithTargets):
        return batch.targets

    def check(self, batches) -> list[str]:
        header, epochs = self.cache.header, self.cache.epochs
        sentences = [
            f"teacher {header['teacher_name']}, from the logit cache {self.cache.folder}: {epochs} "
            f"epoch{'s' * (epochs != 1)} of {header['positions']:,} images, {header['kind']}"
        ]
        if self.epochs > epochs:
            sentences.append(
                f"warning: the logit cache holds {epochs} of the {self.epochs} epochs: each is used up to "
                f"{math.ceil(self.epochs / epochs)} times, with the same augmentation"
            )
        return sentences


class LoaderWithTargets:
    """A training loader whose batches carry cached targets. All other attributes are the loader's."""

    def __init__(self, loader: Loader, cache: LogitCache):
        self.loader, self.cache = loader, cache
        self.epoch = self.start = 0

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.start = epoch % self.cache.epochs, 0
        self.loader.set_epoch(self.epoch)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.loader.load_state_dict(state)
        self.start = state["position"]

    def __iter__(self) -> Iterator[BatchWithTargets]:
        start, self.start = self.start, 0
        for step, batch in enumerate(self.loader, start):
            rows = self.cache.rows(self.epoch, positions_of(self.loader, step))
            self._check_images(batch.indices.numpy(), rows["indices"])
            yield BatchWithTargets(*batch, targets=targets_of(rows, batch.labels.device))

    def _check_images(self, drawn: np.ndarray, cached: np.ndarray) -> None:
        if np.array_equal(drawn, cached):
            return
        row = int((drawn != cached).argmax())
        raise UserError(
            f"the logit cache {self.cache.folder} has the target of {self.index.name(int(cached[row]))} where this run "
            f"draws {self.index.name(int(drawn[row]))}: one of them could be read only then, or only now; restore it, "
            "or write the cache again"
        )


def kind_of_targets(settings: Distillation) -> str:
    """hard: labels; soft: probabilities, from which every other distillation type can be computed."""
    return "hard" if settings.distillation_type == "hard" else "soft"


def positions_of(loader: Loader, step: int) -> slice:
    """The positions of the global order that this process's batch of a step holds."""
    plans = loader.plans
    start = (step * plans.world_size + plans.rank) * plans.batch_size
    return slice(start, start + plans.batch_size)


def targets_of(rows: dict[str, np.ndarray], device: torch.device):
    """Rows of a cache as `distillation_loss` takes them, on the device."""
    if "labels" in rows:
        return _on(device, rows["labels"].astype(np.int64))
    return _on(device, rows["classes"].astype(np.int64)), _on(device, rows["probabilities"].astype(np.float32))


def _on(device: torch.device, array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# Whether the images of a run are those of the cache


def describe(config: Config, loader: Loader, *, mean, std, precision: torch.dtype) -> dict:
    """What the pixels, their order and their mixing depend on: the part of a header that a run must agree with."""
    plans, augmentation = loader.plans, loader.plans.augmentation
    order_depends = augmentation.repeats > 1 or (augmentation.mixes and augmentation.mixup_mode == "batch")
    recipe = {
        **dataclasses.asdict(augmentation),
        "seed": config.run.seed,
        "input_size": size_of(plans.size),
        # None: any batch will do. Only repeated augmentation and one lambda per batch depend on it.
        "global_batch": plans.batch_size * plans.world_size if order_depends else None,
        "mean": mean,
        "std": std,
        "precision": str(precision).removeprefix("torch."),
    }
    for later in ("class_balance", "magnitudes"):  # caches that were written before it existed do not have it
        if not recipe[later]:
            del recipe[later]
    libraries = PIXEL_LIBRARIES[loader.device.type]
    header = {
        "data": {"fingerprint": loader.index.fingerprint, "images": len(loader.index)},
        "recipe": recipe,
        "pixels": {"device": loader.device.type, **{name: _version(name) for name in libraries}},
    }
    return json.loads(json.dumps(header))  # tuples to lists, as in a header that was read


def _version(name: str) -> str:
    """Of the package of this name, or of this name and a CUDA version; without the local part."""
    for distribution in (name, f"{name}-cuda130", f"{name}-cuda120", f"{name}-cuda110"):
        try:
            return importlib.metadata.version(distribution).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return "absent"


def probe_of(loader: Loader, prepare) -> np.ndarray:
    """(PROBE, 3, size, size) float32: the first images of epoch 0 as models see them. For rank 0."""
    loader.set_epoch(0)
    images = prepare(next(iter(loader)))[:PROBE].float().cpu().numpy()
    loader.set_epoch(0)
    return images


def from_cache(cache: LogitCache, config: Config, world: World, loaders: tuple[Loader, Loader], mean, std):
    """(teacher, (training loader, validation loader)) of a run with a logit cache.

    Raises UserError if the cache was written for other images or another distillation setting."""
    header, settings, (loader, validation) = cache.header, config.distillation, loaders
    precision = precision_of(config, world.device)
    own = describe(config, loader, mean=mean, std=std, precision=precision) | {"kind": kind_of_targets(settings)}
    if own["kind"] == "soft":
        own["tau"] = settings.distillation_tau
    if found := differences({key: header.get(key) for key in own}, own):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"the logit cache {cache.folder} is of other images than this run draws: {'; '.join(found[:3])}{more}; "
            "give the flags it was written with, or write it again"
        )
    if own["kind"] == "soft" and settings.logit_standardization and header["top"] < header["classes"]:
        raise UserError(
            f"--logit-standardization needs the logits of all {header['classes']} classes, and the logit cache "
            f"{cache.folder} keeps {header['top']}: write it again with --top {header['classes']}, or omit the flag"
        )
    epochs = Curriculum.of(config).epochs
    if loader.plans.augmentation.magnitudes and cache.epochs < epochs:
        raise UserError(
            f"the logit cache {cache.folder} holds {cache.epochs} of the {epochs} epochs, over all of which "
            f"--curriculum {config.optimization.curriculum} changes RandAugment's magnitude: write it with --views "
            f"{epochs}, or give sizes alone, as in 96,160,224"
        )
    needed = len(loader) * loader.plans.batch_size * world.world_size
    if needed > header["positions"]:
        raise UserError(
            f"the logit cache {cache.folder} has targets for {header['positions']:,} of the {needed:,} images in an "
            f"epoch of this run: use its global batch of {header['global_batch']}, or write it again"
        )
    if world.is_main:
        _check_pixels(cache, probe_of(loader, lambda batch: prepare(batch, mean, std, precision)))
    return CachedTeacher(cache, config), (LoaderWithTargets(loader, cache), validation)


def _check_pixels(cache: LogitCache, drawn: np.ndarray) -> None:
    cached = cache.probe[: len(drawn)]
    drawn = drawn[: len(cached)]
    exact = cache.header["pixels"]["device"] == "cpu"
    if not (np.array_equal(drawn, cached) if exact else np.abs(drawn - cached).mean() <= CLOSE):
        raise UserError(
            f"the logit cache {cache.folder} is of other pixels than this run draws, though data, flags and versions "
            "agree: another version of fastdeit, or another decoder; write it again"
        )
