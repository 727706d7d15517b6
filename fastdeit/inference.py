"""A trained checkpoint, ready to answer: the model in evaluation mode, its input, its classes."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastdeit.kernels import mix_normalize
from fastdeit.pipelines import eval_loader, open_files, open_index

from . import checkpoint
from .config import Config
from .distributed import Place
from .student import build_student, heads
from .weights import load_weights


@dataclass(frozen=True)
class Classifier:
    model: nn.Module
    classes: tuple[str, ...]
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_ratio: float
    device: torch.device

    def prepare(self, batch) -> torch.Tensor:
        """The batch's images, normalised: (batch, 3, input_size, input_size) float32."""
        return mix_normalize(batch.images, self.mean, self.std)

    @torch.inference_mode()
    def probabilities(self, batch, head: str = "both") -> torch.Tensor:
        """(batch, classes) float32: softmax of the class head ("cls"), the distillation head ("dist") or of their
        averaged logits ("both"). A model with one head has "both" only."""
        cls_logits, dist_logits = heads(self.model, self.prepare(batch))
        if dist_logits is None:
            return cls_logits.float().softmax(1)
        logits = {"cls": cls_logits, "dist": dist_logits, "both": (cls_logits + dist_logits) / 2}[head]
        return logits.float().softmax(1)

    def evaluation_loader(self, data_path: Path, batch_size: int, place: Place):
        """Batches of data_path/val, labelled by this model's classes; refused when the folder has others."""
        return self._loader(open_index(data_path, "val", classes=self.classes), batch_size, place)

    def files_loader(self, files: list[Path], batch_size: int, place: Place):
        """Batches of image files, without labels."""
        return self._loader(open_files(files), batch_size, place)

    def _loader(self, index, batch_size: int, place: Place):
        return eval_loader(
            index, batch_size=batch_size, input_size=self.input_size, crop_pct=self.crop_ratio, device=str(place.device),
            rank=place.rank, world_size=place.world_size,
        )  # fmt: skip


def load(source: str | Path, *, device, weights: str = "model", input_size: int | None = None) -> Classifier:
    """Build the model of a checkpoint folder (or of a run's last) and load its weights ("model" or "ema").

    Raises UserError when the folder is no checkpoint.
    """
    folder = checkpoint.find(source)
    saved = checkpoint.description(folder)
    settings = Config.from_dict(saved["settings"])
    settings.model.finetune, settings.model.pretrained, settings.model.drop_path = None, False, 0.0
    settings.data.input_size = input_size or saved["input_size"]
    model = build_student(settings, saved["num_classes"])
    load_weights(model, folder / f"{weights}.safetensors")
    return Classifier(
        model.to(device).eval(), tuple(saved["classes"]), settings.data.input_size, tuple(saved["mean"]),
        tuple(saved["std"]), saved["eval_crop_ratio"], torch.device(device),
    )  # fmt: skip
