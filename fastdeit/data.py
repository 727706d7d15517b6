"""From settings to the two loaders of a run."""

from pathlib import Path

from fastdeit.pipelines import Augmentation, eval_loader, open_index, train_loader

from .config import Config
from .distributed import Place

REPEATS = 3  # repeated augmentation, as in the DeiT recipe


def open_images(config: Config):
    """(training index, validation index) of --data-path; the validation images carry the training classes' labels."""
    training = open_index(config.data.data_path, "train")
    return training, open_index(config.data.data_path, "val", classes=training.classes)


def loaders(config: Config, indices, place: Place, folder: Path | None):
    """(training loader, validation loader) for this process."""
    data, (training, validation) = config.data, indices
    augmentation = Augmentation(
        scale=data.scale, ratio=data.ratio, hflip=data.hflip, src=data.src, aa=data.aa, color_jitter=data.color_jitter,
        reprob=data.reprob, mixup=data.mixup, cutmix=data.cutmix, mixup_prob=data.mixup_prob,
        mixup_switch_prob=data.mixup_switch_prob, mixup_mode=data.mixup_mode,
        repeats=REPEATS if data.repeated_aug else 1,
    )  # fmt: skip
    shared = {
        "batch_size": data.batch_size, "input_size": data.input_size, "device": str(place.device), "rank": place.rank,
        "world_size": place.world_size, "num_threads": data.num_workers,
    }  # fmt: skip
    return (
        train_loader(training, augmentation=augmentation, seed=config.run.seed, **shared),
        eval_loader(validation, crop_pct=data.eval_crop_ratio, **shared),
    )
