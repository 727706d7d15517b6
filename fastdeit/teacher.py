"""The teacher: frozen, in evaluation mode, in half precision on a GPU; it only answers."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from . import checkpoint
from .command import UserError
from .config import Config
from .student import build_student, mean_std


class Teacher:
    """Answers `(batch, classes)` logits to the student's own normalised images, without a gradient graph."""

    def __init__(self, model: nn.Module, *, mean, std, input_size: int, student_mean, student_std, device, dtype):
        self.model = model.to(device, dtype).eval().requires_grad_(False)
        self.dtype, self.input_size = dtype, input_size
        # x_t = (x_s * std_s + mean_s - mean_t) / std_t as one scale and shift; None where the two agree (decided here,
        # once: a comparison on the device would stop the host at every step).
        self.scale = self.shift = None
        if (tuple(mean), tuple(std)) != (tuple(student_mean), tuple(student_std)):
            mean_s, std_s, mean_t, std_t = (torch.tensor(value) for value in (student_mean, student_std, mean, std))
            self.scale = (std_s / std_t).view(1, 3, 1, 1).to(device, dtype)
            self.shift = ((mean_s - mean_t) / std_t).view(1, 3, 1, 1).to(device, dtype)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.dtype)
        if self.scale is not None:
            images = torch.addcmul(self.shift, images, self.scale)
        if images.shape[-1] != self.input_size:
            size = (self.input_size, self.input_size)
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        logits = self.model(images)
        # An inference tensor may not be saved for the student's backward pass: hand over a plain one.
        return logits.clone()


def load_teacher(config: Config, classes: tuple[str, ...], *, student_mean, student_std, device) -> Teacher:
    """The teacher that --teacher-model and --teacher-path name, refused unless its classes are the data's."""
    path, name = config.distillation.teacher_path, config.distillation.teacher_model
    if path is not None and Path(path).is_dir():
        model, input_size, mean, std = _own_checkpoint(checkpoint.find(path), classes)
    else:
        model, input_size, mean, std = _timm_model(name, path, classes)
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    return Teacher(
        model, mean=mean, std=std, input_size=input_size, student_mean=student_mean, student_std=student_std,
        device=device, dtype=dtype,
    )  # fmt: skip


def _own_checkpoint(folder: Path, classes: tuple[str, ...]):
    """A checkpoint folder of ours: config.json holds the model, its input and the names of its classes."""
    from .weights import load_weights

    saved = checkpoint.description(folder)
    if tuple(saved["classes"]) != classes:
        raise UserError(
            f"the teacher {folder} was fitted on {_few(saved['classes'])}, the data has {_few(classes)}: fit one on this "
            "data with `python -m fastdeit.teach fit --data-path DIR --model NAME`"
        )
    settings = Config.from_dict(saved["settings"])
    settings.model.finetune, settings.model.pretrained, settings.model.drop_path = None, False, 0.0
    model = build_student(settings, saved["num_classes"])
    load_weights(model, folder)
    return model, saved["input_size"], saved["mean"], saved["std"]


def _timm_model(name: str, path: str | None, classes: tuple[str, ...]):
    """A timm model with its published weights, or with those of a checkpoint file. Its head is never replaced."""
    import timm

    from .weights import load_weights

    if not timm.is_model(name):
        raise UserError(f"--teacher-model {name}: timm has no model of this name; see timm.list_models()")
    if path is None:
        try:
            model = timm.create_model(name, pretrained=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"the published weights of the teacher {name} could not be loaded ({error.__class__.__name__}); give "
                "them as a file by --teacher-path, or fit a teacher with `python -m fastdeit.teach fit`"
            ) from error
    else:
        model = timm.create_model(name, num_classes=len(classes))
        load_weights(model, path)
    if model.num_classes != len(classes):
        raise UserError(
            f"the teacher {name} answers for {model.num_classes} classes, the data has {len(classes)}: fit a teacher on "
            "this data with `python -m fastdeit.teach fit --data-path DIR --model NAME`"
        )
    mean, std = mean_std(model)
    return model, model.pretrained_cfg["input_size"][-1], mean, std


def _few(names) -> str:
    shown = ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} classes ({shown})"
