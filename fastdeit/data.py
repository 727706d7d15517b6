"""From settings to the two loaders of a run."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from fastdeit.config import Config
from fastdeit.curriculum import Curriculum
from fastdeit.distributed.world import World
from fastdeit.errors import UserError, tell
from fastdeit.kernels import mix_normalize
from fastdeit.pipelines import (
    Augmentation,
    BadFiles,
    Batch,
    Mix,
    Repeated,
    SyntheticIndex,
    WithUnlabelled,
    eval_loader,
    expected_draws,
    hold_out,
    name_of_split,
    natural_order,
    open_classes,
    open_folder,
    open_index,
    printable,
    read_class_names,
    train_loader,
)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


FIRST = 512  # views on which a teacher is looked at before a run


def precision_of(config: Config, device: torch.device) -> torch.dtype:
    """The student's autocast type, and the type of its images."""
    return PRECISIONS[config.speed.precision or ("bf16" if device.type == "cuda" else "fp32")]


def compiles(config: Config, device: torch.device) -> bool:
    """Whether student and teacher are compiled: as --compile says; if it was not given, on a GPU where there is a C
    compiler, which Inductor and Triton need."""
    if config.speed.compile is not None:
        return config.speed.compile
    return device.type == "cuda" and has_compiler()


def has_compiler() -> bool:
    """As Triton looks for one."""
    return "CC" in os.environ or any(map(shutil.which, ("gcc", "clang")))


def prepare(batch, mean, std, dtype: torch.dtype) -> Tensor:
    """The batch's images normalised, erased, mixed: (batch, channels, height, width), see `as_input`."""
    return as_input(batch.images, mean, std, dtype, **({} if batch.mix is None else batch.mix._asdict()))


def as_input(images: Tensor, mean, std, dtype: torch.dtype = torch.float32, **mix) -> Tensor:
    """kernels.mix_normalize of (batch, height, width, 3) uint8 pixels; with a mean and std of one channel, of their
    grey values: (batch, 1, height, width)."""
    if len(mean) == 3:
        return mix_normalize(images, mean, std, dtype=dtype, **mix)
    mixed = mix_normalize(grey(images), [*mean] * 3, [*std] * 3, dtype=dtype, **mix)
    return mixed[:, :1].contiguous()


def grey(images: Tensor) -> Tensor:
    """The grey value of each pixel in all three channels, as Pillow's convert("L") has it (ITU-R BT.601, in 16 bits).
    images: (..., 3) uint8."""
    red, green, blue = images.int().unbind(-1)
    value = (19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16
    return value.to(torch.uint8)[..., None].expand_as(images).contiguous()


def first_views(loader, prepare: Callable, *, parts: int = 1) -> Iterator[Tensor]:
    """The first training images as models see them, in batches, or in the parts of batches that --accumulate makes.

    prepare: of one batch. The loader stands at its beginning afterwards.
    """
    loader.set_epoch(0)
    for batch in islice(loader, -(-FIRST // loader.plans.batch_size)):
        yield from map(prepare, split(batch, parts))
    loader.set_epoch(0)


def split(batch: Batch, parts: int) -> list[Batch]:
    """`parts` batches of equal size. Mixing pairs neighbours, so a part of even size holds its samples' partners."""
    if parts == 1:
        return [batch]
    size = len(batch.labels) // parts
    return [_part(batch, start, start + size) for start in range(0, parts * size, size)]


def _part(batch: Batch, start: int, end: int) -> Batch:
    mix = batch.mix
    if mix is not None:
        mix = Mix(*(tensor[start:end] for tensor in mix))
        mix = mix._replace(partner=mix.partner - start)
    part = Batch(batch.images[start:end], batch.labels[start:end], batch.indices[start:end], mix)
    if not hasattr(batch, "targets"):
        return part
    targets = batch.targets  # from a logit cache
    return type(batch)(
        *part, tuple(t[start:end] for t in targets) if isinstance(targets, tuple) else targets[start:end]
    )


REPEATS = 3  # repeated augmentation, as in the DeiT recipe


SYNTHETIC_VALIDATION = 2048  # images; the training set counts as many as ImageNet-1k


def open_images(config: Config, world: World):
    """(training index, validation index) of --data-path; the validation images carry the training classes' labels.

    The list of files with their sizes is kept beside the runs, in index-cache, and read again while the files stay.
    """
    if str(config.data.data_path) == "synthetic":
        return SyntheticIndex(), SyntheticIndex(SYNTHETIC_VALIDATION)
    runs = config.run.output_dir.parent if config.run.output_dir is not None else Path("runs")
    cache = None if config.run.dry_run else runs / "index-cache"
    if not world.is_main:
        world.barrier()  # rank 0 reads the headers and writes the cache, the others read that
    path, classes = Path(config.data.data_path), config.data.classes and read_class_names(config.data.classes)
    shared = {"label_column": config.data.label_column, "cache_dir": cache}
    if config.data.val_share is None:
        _refuse_without_val(path)
        training = open_index(path, "train", classes=classes, **shared)
        _refuse_one_class(training, path)
        validation = open_index(path, "val", classes=training.classes, **shared)
    else:
        if (name := name_of_split(path, "val")) not in (None, "test"):
            raise UserError(f"--val-share: {path} has validation images of its own ({name}): omit the flag")
        images = _open_all(path, classes, **shared)
        _refuse_one_class(images, path)
        training, validation = hold_out(images, config.data.val_share, config.run.seed)
    if config.distillation.unlabelled_path is not None:
        training = WithUnlabelled(training, open_folder(config.distillation.unlabelled_path, cache_dir=cache))
    if world.is_main:
        world.barrier()
    return training, validation


def labelled_alone(indices):
    """The indices without the training images that have no labels; those that have come more often for it, so that an
    epoch keeps its steps."""
    training, validation = indices
    if isinstance(training, WithUnlabelled):
        training = Repeated(training.parts[0], len(training))
    return training, validation


def lines_of_names(index) -> str:
    """The name of each image, a line each."""
    return "".join(f"{printable(index.name(i))}\n" for i in range(len(index)))


def _refuse_without_val(path: Path) -> None:
    """Where --val-share would do."""
    lacking = [split for split in ("train", "val") if name_of_split(path, split) is None]
    folders = path.is_dir() and any(entry.is_dir() for entry in path.iterdir())
    if "val" in lacking and folders:
        holds = "has no val" if lacking == ["val"] else "has neither train nor val"
        raise UserError(
            f"{path} {holds}: --val-share 0.1 validates on a tenth of the images of "
            f"{'train' if lacking == ['val'] else 'its class folders'}, and trains on the others"
        )


def open_validation(path: Path, *, classes, settings: dict | None, label_column=None, cache_dir=None):
    """The index of the validation images of --data-path; of a run that held some out and finds no others there, those.

    settings: the run's, as a checkpoint has them; None without a run
    """
    share = (settings or {}).get("data", {}).get("val_share")
    if settings is None or share is None or name_of_split(path, "val") is not None:
        return open_index(path, "val", classes=classes, label_column=label_column, cache_dir=cache_dir)
    return hold_out(_open_all(path, classes, label_column, cache_dir), share, settings["run"]["seed"])[1]


def _open_all(path: Path, classes, label_column, cache_dir):
    """What is to be split: train, or a folder of classes."""
    if path.is_dir() and name_of_split(path, "train") is None:
        return open_classes(path, classes=classes, cache_dir=cache_dir)
    return open_index(path, "train", classes=classes, label_column=label_column, cache_dir=cache_dir)


def _refuse_one_class(training, path: Path) -> None:
    if len(training.classes) > 1:
        return
    within = []
    if training.path(0) is not None and training.split:  # split/CLASS/...
        folder = path.joinpath(*Path(training.records.names[0]).parts[:2])
        within = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    few = ", ".join(map(printable, within[:5])) + (", ..." if len(within) > 5 else "")
    remedy = (
        f" (which holds the folders {few}): is --data-path one level too high?" if within else ": give at least two"
    )
    raise UserError(f"{path} has one class only, {training.classes[0]}{remedy}")


def order_of_numbers(classes: Sequence[str]) -> str | None:
    """What to say of weights without class names, if `classes` are in the order of strings and numbers order them
    otherwise."""
    if natural_order(classes) == list(classes) or sorted(classes) != list(classes):
        return None
    few = ", ".join(classes[:4])
    return (
        f"the classes are sorted as strings ({few}, ...) and the weights do not name theirs: if these were sorted as "
        "numbers, as timm does, the labels are mixed up; --classes FILE gives their order"
    )


def threads(config: Config) -> int:
    """For reading and decoding: --num-workers, or this process's share of the cores. torchrun says how many processes
    the machine runs; SLURM gives each its own cores to begin with."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.data.num_workers or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def trusted_decoding(index, world: World, num_threads: int | None = None):
    """How the GPUs decode: what rank 0 finds of its own with some of these images. None where nothing is decoded on
    one. See pipelines/decode/probe.py."""
    if world.device.type != "cuda" or isinstance(index, SyntheticIndex):
        return None
    choice = None
    if world.is_main:
        from fastdeit.pipelines.decode.probe import trusted

        choice = trusted(index, world.device.index, num_threads)
        if choice.sentence:
            tell(choice.sentence)
    return world.broadcast(choice).decoding


def loaders(config: Config, indices, world: World, folder: Path | None):
    """(training loader, validation loader) for this process. `folder`: the run's, for bad_files.txt, or None."""
    data, (training, validation) = config.data, indices
    augmentation = Augmentation(
        scale=data.scale, ratio=data.ratio, hflip=data.hflip, src=data.src, aa=data.aa, color_jitter=data.color_jitter,
        reprob=data.reprob, mixup=data.mixup, cutmix=data.cutmix, mixup_prob=data.mixup_prob,
        mixup_switch_prob=data.mixup_switch_prob, mixup_mode=data.mixup_mode,
        repeats=REPEATS if data.repeated_aug else 1, class_balance=data.class_balance,
        magnitudes=Curriculum.of(config).magnitudes,
    )  # fmt: skip
    shared = {
        "input_size": data.input_size, "device": str(world.device), "rank": world.rank,
        "world_size": world.world_size, "num_threads": threads(config),
        "decoding": trusted_decoding(training, world, threads(config)),
    }  # fmt: skip
    evaluated = min(data.batch_size, -(-len(validation) // world.world_size))  # at a time: the last batch is padded
    bad_files = [
        BadFiles.of(index, limit=data.max_bad, path=folder and folder / "bad_files.txt")
        for index in (training, validation)
    ]
    return (
        train_loader(
            training,
            batch_size=data.batch_size * config.optimization.accumulate,
            augmentation=augmentation,
            seed=config.run.seed,
            bad_files=bad_files[0],
            **shared,
        ),
        eval_loader(validation, batch_size=evaluated, crop_pct=data.eval_crop_ratio, bad_files=bad_files[1], **shared),
    )


def remarks(config: Config, indices) -> list[str]:
    """What of the data a user should know before a run, in sentences."""
    training, validation = indices
    said = []
    if (share := config.data.val_share) is not None:
        without = len(set(range(len(validation.classes))) - set(validation.labels.tolist()))
        more = f"; {without} classes have one image, which is trained on" if without else ""
        said.append(f"--val-share {share}: {len(validation):,} images are held out, validation.txt lists them{more}")
    if getattr(validation, "split", "val") == "test":
        said.append(
            f"{config.data.data_path} has no val: the test images are the validation images, and the checkpoint best "
            "is chosen on them, so its top-1 is no longer that of images it never saw; keep a val of its own for that"
        )
    if config.data.class_balance > 0:
        said.append(_balance_in_words(config.data.class_balance, training))
    from_timm = config.model.pretrained and not config.model.finetune  # of a file, models.weights says it
    if from_timm and config.data.classes is None and (order := order_of_numbers(training.classes)):
        said.append(order)
    return said


def _balance_in_words(strength: float, training) -> str:
    labels, images, draws = expected_draws(training.labels, strength, len(training))
    rows = [row for row in zip(images.tolist(), labels.tolist(), (draws / images).tolist()) if row[1] >= 0]
    rare, common = (
        f"{printable(training.classes[label])} (of {count:,}) is drawn {times:,.2f} times"
        for count, label, times in (min(rows), max(rows))
    )
    return f"--class-balance {strength:g}: in an epoch, an image of {rare}, one of {common}"
