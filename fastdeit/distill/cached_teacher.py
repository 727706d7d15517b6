"""Training from a store: each batch comes with the teacher's answers to it, and no teacher is in memory.

Epoch e trains on view e mod V, the order and the pixels of epoch e mod V of a run with a live teacher. Whether this run
draws those pixels is checked before it starts: data, recipe and the versions of what decodes and resizes must be those
of the store, and the first images must come out as the teacher saw them.
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

from fastdeit.config import Config
from fastdeit.data import precision_of, prepare
from fastdeit.distributed.world import World
from fastdeit.errors import UserError
from fastdeit.pipelines import Loader, Mix

from .logit_cache import Store, differences

PROBE = 8  # images
CLOSE = 0.02  # mean difference of the probe on a GPU, in standard deviations: a few levels of 255 in some pixels
PIXEL_LIBRARIES = {"cpu": ("nvidia-dali", "torch", "pillow"), "cuda": ("nvidia-dali",)}


class TaughtBatch(NamedTuple):
    """A `Batch` with the teacher's answers: (B,) int64 decisions, or (classes (B, K) int64, probabilities (B, K))."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    mix: Mix | None
    answers: Any


class StoredTeacher:
    """Takes the place of a live teacher in the trainer."""

    def __init__(self, store: Store, config: Config):
        self.store, self.epochs, self.name = store, config.optimization.epochs, f"of the store {store.folder}"
        self.fingerprint = store.fingerprint

    def __call__(self, images: Tensor, batch: TaughtBatch):
        return batch.answers

    def check(self, batches) -> list[str]:
        header = self.store.header
        sentences = [
            f"teacher {header['teacher_name']}, answers of {self.store.folder}: {header['views']} views of "
            f"{header['positions']:,} images, {header['kind']}"
        ]
        if self.epochs > header["views"]:
            times = math.ceil(self.epochs / header["views"])
            sentences.append(
                f"warning: {self.epochs} epochs of {header['views']} stored views: a view is used up to {times} times"
            )
        return sentences


class TaughtLoader:
    """A training loader whose batches carry stored answers. Everything else is the loader's."""

    def __init__(self, loader: Loader, store: Store):
        self.loader, self.store = loader, store
        self.view = self.start = 0

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        self.view, self.start = epoch % self.store.views, 0
        self.loader.set_epoch(self.view)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.loader.load_state_dict(state)
        self.start = state["position"]

    def __iter__(self) -> Iterator[TaughtBatch]:
        start, self.start = self.start, 0
        for step, batch in enumerate(self.loader, start):
            rows = self.store.rows(self.view, positions_of(self.loader, step))
            self._same_images(batch.indices.numpy(), rows["indices"])
            yield TaughtBatch(*batch, answers=answers_of(rows, batch.labels.device))

    def _same_images(self, drawn: np.ndarray, stored: np.ndarray) -> None:
        if np.array_equal(drawn, stored):
            return
        row = int((drawn != stored).argmax())
        raise UserError(
            f"the store {self.store.folder} has the answer to {self.index.name(int(stored[row]))} where this run draws "
            f"{self.index.name(int(drawn[row]))}: an image could be read then and not now, or the other way round; "
            "restore it, or store again"
        )


def positions_of(loader: Loader, step: int) -> slice:
    """The positions of the global order that this process's batch of a step holds."""
    plans = loader.plans
    start = (step * plans.world_size + plans.rank) * plans.batch_size
    return slice(start, start + plans.batch_size)


def answers_of(rows: dict[str, np.ndarray], device: torch.device):
    """Rows of a store as `distillation_loss` takes them, on the device."""
    if "labels" in rows:
        return _on(device, rows["labels"].astype(np.int64))
    return _on(device, rows["classes"].astype(np.int64)), _on(device, rows["probabilities"].astype(np.float32))


def _on(device: torch.device, array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# What a run's views are, and whether they are the store's


def describe(config: Config, loader: Loader, *, mean, std, precision: torch.dtype) -> dict:
    """What the pixels, their order and their mixing depend on: the part of a header that a run must agree with."""
    plans, augmentation = loader.plans, loader.plans.augmentation
    order_depends = augmentation.repeats > 1 or (augmentation.mixes and augmentation.mixup_mode == "batch")
    recipe = {
        **dataclasses.asdict(augmentation),
        "seed": config.run.seed,
        "input_size": plans.size,
        # Else the batch may be another: only how images repeat, and one lambda a batch, know of it.
        "global_batch": plans.batch_size * plans.world_size if order_depends else None,
        "mean": mean,
        "std": std,
        "precision": str(precision).removeprefix("torch."),
    }
    libraries = PIXEL_LIBRARIES[loader.device.type]
    return json.loads(
        json.dumps(
            {
                "data": {"fingerprint": loader.index.fingerprint, "images": len(loader.index)},
                "recipe": recipe,
                "pixels": {"device": loader.device.type, **{name: _version(name) for name in libraries}},
            }
        )
    )


def _version(name: str) -> str:
    """Of what is installed under this name, or with a suffix for its CUDA version; without the build's."""
    for distribution in (name, f"{name}-cuda130", f"{name}-cuda120", f"{name}-cuda110"):
        try:
            return importlib.metadata.version(distribution).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return "absent"


def probe_of(loader: Loader, prepare) -> np.ndarray:
    """(PROBE, 3, size, size) float32: the first images of view 0 as models see them. For rank 0."""
    loader.set_epoch(0)
    images = prepare(next(iter(loader)))[:PROBE].float().cpu().numpy()
    loader.set_epoch(0)
    return images


def take(store: Store, config: Config, world: World, loaders: tuple[Loader, Loader], mean, std):
    """(teacher, (training loader, validation loader)) of a run from a store. Raises UserError if the run is not its."""
    header, settings, (loader, validation) = store.header, config.distillation, loaders
    precision = precision_of(config, world.device)
    own = describe(config, loader, mean=mean, std=std, precision=precision) | {"kind": settings.distillation_type}
    if settings.distillation_type == "soft":
        own["tau"] = settings.distillation_tau
    if found := differences({key: header.get(key) for key in own}, own):
        raise UserError(_refusal(store, found))
    needed = len(loader) * loader.plans.batch_size * world.world_size
    if needed > header["positions"]:
        raise UserError(
            f"the store {store.folder} has answers for {header['positions']:,} of the {needed:,} images that an epoch "
            f"of this run takes: use its global batch of {header['global_batch']}, or store again"
        )
    if world.is_main:
        _same_pixels(store, probe_of(loader, lambda batch: prepare(batch, mean, std, precision)))
    return StoredTeacher(store, config), (TaughtLoader(loader, store), validation)


def _refusal(store: Store, found: list[str]) -> str:
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return (
        f"the store {store.folder} has the teacher's answers to other images than this run draws: "
        f"{'; '.join(found[:3])}{more}; give the flags it was written with, or store again"
    )


def _same_pixels(store: Store, drawn: np.ndarray) -> None:
    stored = store.probe[: len(drawn)]
    drawn = drawn[: len(stored)]
    exact = store.header["pixels"]["device"] == "cpu"
    if not (np.array_equal(drawn, stored) if exact else np.abs(drawn - stored).mean() <= CLOSE):
        raise UserError(
            f"the store {store.folder} has the teacher's answers to other pixels than this run draws, though data, "
            "flags and versions agree: another version of fastdeit, or another decoder; store again"
        )
