"""A trained model on its device, ready to predict: loaded from whatever loading.load_model takes.

load("runs/cats")                                                     a run's last checkpoint
load("deit_small.pth", name="deit_small_patch16_224")                 a file, and the model that it is of
load("deit_tiny_patch16_224.fb_in1k")                                 timm's published weights
"""

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from fastdeit.config import Size, height_width, in_pixels
from fastdeit.data import PRECISIONS, as_input, open_validation, order_of_numbers, trusted_decoding
from fastdeit.distributed.world import World
from fastdeit.errors import UserError
from fastdeit.pipelines import BadFiles, eval_loader, open_files, read_class_names

from .heads import logits_by_head
from .loading import LoadedModel, load_model

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Classifier(LoadedModel):
    """A LoadedModel on `device`, which computes in `dtype`."""

    device: torch.device
    dtype: torch.dtype = torch.float32

    def prepare(self, batch) -> torch.Tensor:
        """The batch's images, normalised: (batch, channels, height, width) float32."""
        return as_input(batch.images, self.mean, self.std)

    @torch.inference_mode()
    def logits(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(batch, classes) float32 by head, see heads.logits_by_head. images: as `prepare` gives them."""
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if half else nullcontext():
            return logits_by_head(self.model, images)

    def probabilities(self, images: torch.Tensor, head: str = "both") -> torch.Tensor:
        """(batch, classes) float32: softmax of the class head ("cls"), the distillation head ("dist") or of their
        averaged logits ("both"). A model with one head uses that, whether "cls" or "both" is asked for."""
        logits = self.logits(images)
        if len(logits) == 1 and head == "dist":
            raise UserError("this model has no distillation head: omit --head")
        return logits["cls" if len(logits) == 1 else head].softmax(1)

    def evaluation_loader(
        self,
        data_path: Path,
        batch_size: int,
        world: World,
        *,
        max_bad: float = 0.01,
        order: Path | None = None,
        label_column: str | None = None,
    ):
        """Batches of data_path/val, labelled by this model's classes; refused when the folder has others. A model
        without names takes those of the file `order` or, without it, the folder's classes in sorted order, if it
        has as many."""
        classes = self.classes
        if order is not None:
            classes = read_class_names(order)
            if self.classes not in (None, classes):
                raise UserError(f"--classes {order}: the checkpoint names its classes, in another order: omit the flag")
        index = open_validation(
            Path(data_path), classes=classes, settings=self.config.get("settings"), label_column=label_column
        )
        if classes is None and world.is_main and (said := order_of_numbers(index.classes)):
            log.warning(said)
        if len(index.classes) != self.model.num_classes:
            raise UserError(
                f"{data_path} has {len(index.classes)} classes in val, the model has {self.model.num_classes}: "
                "evaluate it on the data it was trained for, or fine-tune it on this one (fastdeit.train --finetune)"
            )
        return self._loader(index, batch_size, world, BadFiles.of(index, limit=max_bad))

    def files_loader(self, files: list[str | Path], batch_size: int, world: World):
        """Batches of image files, without labels. Unreadable ones are noted in its bad_files, however many they are."""
        index = open_files(files)
        return self._loader(index, batch_size, world, BadFiles.of(index, limit=1.0))

    def _loader(self, index, batch_size: int, world: World, bad_files: BadFiles):
        if batch_size < 1:
            raise UserError(f"--batch-size {batch_size}: take at least one image per step")
        return eval_loader(
            index, batch_size=batch_size, input_size=self.input_size, crop_pct=self.crop_pct,
            device=str(world.device), rank=world.rank, world_size=world.world_size, bad_files=bad_files,
            decoding=trusted_decoding(index, world),
        )  # fmt: skip


def load(
    source: str | Path,
    *,
    device,
    weights: str = "model",
    input_size: Size | None = None,
    name: str | None = None,
    default_name: str | None = None,
    pretrained: bool = False,
    precision: str | None = None,
    crop_pct: float | None = None,
) -> Classifier:
    """The classifier that `source` means.

    source, name, default_name, pretrained, weights, input_size: see loading.load_model
    crop_pct: share of the resized image's side that the centre crop keeps. The checkpoint's or model's own if None.
    precision: a key of PRECISIONS, for the model's arithmetic. If None, on CUDA that which was chosen for its training,
        or fp16; fp32 elsewhere

    Raises UserError, or ValueError for weights that do not fit.
    """
    if input_size is not None and min(height_width(input_size)) < 1:
        raise UserError(f"--input-size {in_pixels(input_size)}: must be at least 1")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise UserError(f"--eval-crop-ratio {crop_pct}: must lie above 0 and up to 1")
    device = torch.device(device)
    loaded = load_model(
        source, name=name, default_name=default_name, pretrained=pretrained, weights=weights, input_size=input_size,
        device=device,
    )  # fmt: skip
    model = loaded.model.to(device).eval().requires_grad_(False)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    dtype = PRECISIONS[precision or (loaded.precision or "fp16" if device.type == "cuda" else "fp32")]
    settings = vars(loaded) | {"model": model, "crop_pct": crop_pct or loaded.crop_pct}
    return Classifier(**settings, device=device, dtype=dtype)
