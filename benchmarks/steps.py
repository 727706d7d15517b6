"""What the benchmarks of full training steps share: our trainer on noise, cached logits, steps in turn.

Steps are called as training calls them, launches and all, with no cache flushed in between. A
sample is, on a GPU, the time between two events around a few steps in a row; on the CPU, the CPU time of a step, which
other work on the machine disturbs less than the clock, on one thread, because threads that wait take CPU time too.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fastdeit.config import Config
from fastdeit.data import loaders, open_images
from fastdeit.distill import logit_cache
from fastdeit.distill.cached_teacher import BatchWithTargets, targets_of
from fastdeit.distributed.world import World, pick_device
from fastdeit.models.build import build_student
from fastdeit.pipelines import Batch, Loader
from fastdeit.training import student_tuning
from fastdeit.training.loop import Loop
from fastdeit.training.trainer import Trainer
from fastdeit.tuning import of_run

from .timing import Timing

CLASSES = 1000
RESIDENT = 8  # batches: one noise, mixed and erased in so many ways
IN_A_ROW = 5  # steps of a sample on a GPU
CACHED_STEPS = 64  # used again and again
Step = Callable[[], torch.Tensor]  # one training step; returns its loss, a tensor on the device


def fill_in(arguments: argparse.Namespace, **choices: tuple) -> argparse.Namespace:
    """Each choice that the command line leaves open: (on a GPU, on the CPU, in a quick run)."""
    for name, values in choices.items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, values[2 if arguments.quick else int(arguments.device == "cpu")])
    return arguments


def speed(images_per_s: float, device: torch.device) -> str:
    return f"{images_per_s:,.{1 if images_per_s < 100 else 0}f} images/{'CPU-s' if device.type == 'cpu' else 's'}"


def pick_world(device: str) -> World:
    if device == "cpu":
        torch.set_num_threads(1)
    return World(pick_device(device))


# Of the settings of speed, for contenders that show one thing at a time: nothing measured, nothing captured.
AS_WRITTEN = {"attention": "sdpa", "tune": "off", "cuda_graph": "off"}


def configuration(student: str, *, batch_size: int, pixels: int, **speed) -> Config:
    """The DeiT recipe with hard distillation, as the settings' defaults have it: what a user gets who says nothing but
    `speed`, settings of the group of that name."""
    config = Config()
    config.data.data_path, config.data.batch_size, config.data.input_size = Path("synthetic"), batch_size, pixels
    config.model.model, config.distillation.distillation_type = student, "hard"
    config.speed = replace(config.speed, **speed)
    return config


def noise(config: Config, world: World) -> Loader:
    """The training loader of `--data-path synthetic`: noise on the device, with what to mix and to erase drawn as for
    real images."""
    return loaders(config, open_images(config, world), world, None)[0]


def loop_on(config: Config, world: World, loader) -> Loop:
    """A run without a teacher yet, silent, writing nothing. What it chooses by measurement is in its `choices`."""
    model, tuner = build_student(config, CLASSES)[0], of_run(config, world, None)
    arrangement = student_tuning.ask(tuner, model, config)
    trainer = Trainer(config, world, model, None, steps_per_epoch=len(loader), arrangement=arrangement)
    trainer.model.train()
    both = loader, loader  # nothing is evaluated
    loop = Loop(trainer, both, [str(i) for i in range(CLASSES)], None, choices=tuner.to_json())
    loop.log.close()
    loop.log.console.quiet = True
    return loop


def our_step(loop: Loop, teacher, batches: Iterable[Batch | BatchWithTargets]) -> Step:
    """Loop.step, and the look at earlier steps' losses that the loop takes after it. One that is not finite raises."""
    endless = itertools.cycle(batches) if isinstance(batches, list) else iter(batches)

    def step() -> torch.Tensor:
        loop.trainer.teacher = teacher
        loss = loop.step(next(endless))[0]
        loop.checkpointing.look()
        return loss

    return step


def random_cache(folder: Path, indices: np.ndarray, batch_size: int) -> logit_cache.LogitCache:
    """A logit cache with a random label for each position. indices: (views, positions), the images they are of."""
    views, positions = indices.shape
    steps = positions // batch_size
    header = {
        "format": logit_cache.FORMAT, "kind": "hard", "classes": CLASSES, "views": views, "positions": positions,
        "global_batch": batch_size, "piece_steps": steps,
    }  # fmt: skip
    logit_cache.create(folder, header, np.zeros(1))
    writer = logit_cache.Writer(folder, header, 0, 1)
    labels = np.random.default_rng(0).integers(CLASSES, size=indices.shape)
    for view in range(views):
        rows = {"indices": indices[view], "labels": labels[view]}
        writer.write((view, 0, steps), {name: row.reshape(steps, batch_size) for name, row in rows.items()})
    writer.close()
    return logit_cache.LogitCache(folder)


def with_cached_logits(folder: Path, batches: list[Batch]) -> Iterator[BatchWithTargets]:
    """The batches again and again, with labels as a training run reads them, from a mapped file to the device. Their
    teacher is `of_the_batch`."""
    size = len(batches[0].labels)
    cache = random_cache(folder, np.zeros((1, CACHED_STEPS * size), np.int64), size)
    for start, batch in zip(itertools.cycle(range(0, CACHED_STEPS * size, size)), itertools.cycle(batches)):
        yield BatchWithTargets(*batch, targets_of(cache.rows(0, slice(start, start + size)), batch.labels.device))


def of_the_batch(images, batch: BatchWithTargets):
    return batch.targets


def built(build: Callable[[], Step], device: torch.device, warm_up: int) -> tuple[Step, int | None]:
    """A step, built, compiled and found to give finite losses; and the most bytes that it and what it was built of hold
    at once, None on the CPU."""
    gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if gpu else 0
    step = build()
    for _ in range(warm_up):
        loss = step().item()
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss}")
    if not gpu:
        return step, None
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return step, torch.cuda.max_memory_allocated() - before


def in_turn(steps: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, Timing]:
    """The time of a step of each, microseconds, over so many samples each, taken in turns."""
    sample = _gpu_sample if device.type == "cuda" else _cpu_sample
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            samples[name].append(sample(step))
    quantiles = torch.tensor([0.5, 0.1, 0.9])
    return {
        name: Timing(*torch.tensor(times).quantile(quantiles).tolist(), graph=False) for name, times in samples.items()
    }


def _cpu_sample(step: Callable[[], object]) -> float:
    started = time.process_time()
    step()
    return 1e6 * (time.process_time() - started)


def _gpu_sample(step: Callable[[], object]) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    for _ in range(IN_A_ROW):
        step()
    after.record()
    torch.cuda.synchronize()
    return 1e3 * before.elapsed_time(after) / IN_A_ROW
