"""Claim: data are never the bottleneck: an epoch from JPEGs runs as fast as one from noise that is already there.

    python -m benchmarks epoch [--data-path DIR] [--student deit_small_distilled_patch16_224] [--batch-size 256]

Full epochs, the start of each included, with all that the DeiT recipe does to an image (random resized crops, flips,
RandAugment, erasing, mixup and cutmix, each image three times an epoch) and hard distillation:

    fastdeit, from disk   the trainer's own epoch over its own loader, with cached logits
    fastdeit, noise       the same trainer, on noise that is on the device (mixed and erased all the same)
    timm, from disk       timm's loader, a worker for each core, which mixes there, and the step of its train.py with a
                          live teacher, the only one it knows; each image once an epoch
    timm, noise           that step on noise that is on the device

Interleaved, an epoch each a round, medians. `share_of_noise` is what remains of the speed on noise; for ours it stands
in the place of the share of the floor. Without --data-path: JPEGs of 500 x 375 cut from two photographs, about the size
of ImageNet's, all in the page cache; on a GPU under 128 names each, so that an epoch is long enough.

On the CPU decoding and training share the cores, and speeds are those of CPU time, all processes': the share then says
what images cost beside the smallest student's step, and nothing about a GPU.
"""

import argparse
import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import FastCollateMixup

from fastdeit.data import loaders
from fastdeit.distill.cached_teacher import CachedTeacher, LoaderWithTargets
from fastdeit.distributed.world import World
from fastdeit.pipelines import Loader, SyntheticIndex, open_index
from fastdeit.pipelines.augment.sampler import epoch_order
from fastdeit.training.loop import Loop

from . import charts, peers
from .pipeline import CORES, Epoch, make_images, measure, needs_dali, timm_loader
from .record import Headline, Record, parser
from .steps import CLASSES, configuration, fill_in, loop_on, pick_world, random_cache, speed

COLUMNS = ("contender", "cores", "images_an_epoch", "images_per_s", "images_per_cpu_s", "share_of_noise")
VIEWS = 4  # epochs in the cache, used again and again
SOURCES = ("from disk", "noise")


def with_cache(loader: Loader, folder: Path) -> LoaderWithTargets:
    """The loader with a logit cache, drawn at random, for the very images it gives."""
    plans = loader.plans
    length = len(loader) * plans.batch_size
    orders = [
        epoch_order(
            len(loader.index), seed=plans.seed, epoch=view, repeats=plans.augmentation.repeats,
            global_batch=plans.batch_size,
        )[0][:length]
        for view in range(VIEWS)
    ]  # fmt: skip
    return LoaderWithTargets(loader, random_cache(folder, np.stack(orders), plans.batch_size))


def our_epochs(loop: Loop, loader: LoaderWithTargets) -> Epoch:
    def epoch() -> Iterator[int]:
        loop.train_loader = loader
        loop.train_epoch(loop.state.step // loop.steps_per_epoch)
        yield loop.steps_per_epoch * loop.trainer.global_batch

    return epoch


def ours(arguments: argparse.Namespace, root: Path, world: World, folder: Path) -> dict[str, Epoch]:
    """As a user gets it by default, but for --compile."""
    config = configuration(
        arguments.student, batch_size=arguments.batch_size, pixels=arguments.pixels, compile=arguments.compile
    )
    index = open_index(root)
    sources = {}
    for name, source in zip(SOURCES, (index, SyntheticIndex(len(index), CLASSES))):
        loader, _ = loaders(config, (source, source), world, None)
        sources[name] = with_cache(loader, folder / name)
    loop = loop_on(config, world, sources["from disk"])
    loop.trainer.teacher = CachedTeacher(sources["from disk"].cache, config)
    return {f"fastdeit, {name}": our_epochs(loop, loader) for name, loader in sources.items()}


def theirs(arguments: argparse.Namespace, root: Path, device: torch.device) -> dict[str, Epoch]:
    size, pixels = arguments.batch_size, arguments.pixels
    if (lacking := peers.timm_lacks()) is not None:
        print(f"timm is left out: {lacking}")
        return {}
    step = peers.Timm(
        peers.student_of_timm(arguments.student, classes=CLASSES, pixels=pixels, drop_path=0.1),
        timm.create_model(arguments.teacher, num_classes=CLASSES), device=device, compile=arguments.compile,
        dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, channels_last=False,
    )  # fmt: skip
    loader = timm_loader(
        root, size, arguments.device, input_size=(3, pixels, pixels), auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=0.25, re_mode="pixel", collate_fn=FastCollateMixup(**peers.MIXING, num_classes=CLASSES),
    )  # fmt: skip
    images = torch.randint(0, 256, (size, 3, pixels, pixels), dtype=torch.uint8).to(device)
    noise = peers.mixed(peers.noise(images, torch.arange(size, device=device), erase=0.25), CLASSES)

    def epochs(batches: Callable) -> Epoch:
        def epoch() -> Iterator[int]:
            for images, targets in batches():
                step(images, targets)
                yield len(images)
            if device.type == "cuda":
                torch.cuda.synchronize()

        return epoch

    steps = max(1, len(loader) // 4)
    return {"timm, from disk": epochs(lambda: loader), "timm, noise": epochs(lambda: islice(noise, steps))}


def multiply(root: Path, times: int) -> None:
    """Each file under so many names."""
    for file in list(root.rglob("*.jpg")):
        for number in range(1, times):
            os.link(file, file.with_name(f"{file.stem}_{number}.jpg"))


def settings() -> argparse.Namespace:
    own = parser(__doc__)
    own.add_argument("--data-path", type=Path, help="a folder DIR/train/CLASS of JPEGs")
    own.add_argument("--student", help="default: DeiT-S, on the CPU DeiT-Ti")
    own.add_argument("--teacher", help="timm's; default: regnety_160, on the CPU regnety_016")
    own.add_argument("--batch-size", type=int)
    own.add_argument("--rounds", type=int)
    own.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    tiny = "deit_tiny_distilled_patch16_224"
    return fill_in(
        own.parse_args(), student=("deit_small_distilled_patch16_224", tiny, tiny), batch_size=(256, 8, 4),
        teacher=("regnety_160", "regnety_016", "test_byobnet"), rounds=(2, 3, 1), compile=(True, False, False),
        pixels=(224, 224, 32), images=(400, 64, 8), names=(128, 1, 1),
    )  # fmt: skip


def headline(arguments: argparse.Namespace, speeds: dict[str, float], device: torch.device) -> Headline:
    mine, other = speeds["fastdeit, from disk"], speeds["timm, from disk"]
    what = f"epoch from JPEGs, {arguments.student}, cached logits, batch {arguments.batch_size}"
    share = round(mine / speeds["fastdeit, noise"], 3)
    return Headline(what, speed(mine, device), "timm", speed(other, device), round(mine / other, 3), share)


def main() -> None:
    arguments = settings()
    needs_dali()
    record, world = Record("epoch", arguments, COLUMNS), pick_world(arguments.device)
    record.conditions |= {name: getattr(arguments, name) for name in ("student", "teacher", "batch_size", "rounds")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        root = arguments.data_path or folder / "images"
        if arguments.data_path is None:
            make_images(root, arguments.images)
            multiply(root, arguments.names)
        contestants = ours(arguments, root, world, folder) | theirs(arguments, root, world.device)
        images = len(open_index(root)) // arguments.batch_size * arguments.batch_size
        measured = measure(contestants, arguments.rounds, warm_up=not arguments.quick)
    gc.unfreeze()  # what the trainer's loop has frozen
    column = 1 if arguments.device == "cpu" else 0
    speeds = {name: figures[column] for name, figures in measured.items()}
    for name, (wall, cpu) in measured.items():
        share = speeds[name] / speeds[f"{name.partition(',')[0]}, noise"]
        record.rows.append([name, CORES, images, f"{wall:.1f}", f"{cpu:.1f}", f"{share:.3f}"])
        figures = f"{wall:10.1f} images/s{cpu:10.1f} per CPU-second{100 * share:7.1f} % of the speed on noise"
        print(f"{name:24}{' runs' if arguments.quick else figures}")
    if "timm, from disk" in speeds:
        record.headlines.append(headline(arguments, speeds, world.device))
    record.write()
    if (chart := record.path("epoch.png")) is not None:
        titles = (f"images/s, {CORES} cores", "images per CPU-second")
        charts.bars({title: {name: v[i] for name, v in measured.items()} for i, title in enumerate(titles)}, chart)


if __name__ == "__main__":
    main()
