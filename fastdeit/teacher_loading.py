"""Teachers by name: any model of timm with its published weights, a folder timm can load, a checkpoint file, our runs.

A head is never replaced: a teacher that answers for other classes than the data's is refused, or translated by
--teacher-classes (teacher_classes.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import checkpoint
from .architectures import unknown_model_message
from .command import UserError
from .config import Distillation
from .student import create_timm, mean_std, rebuild
from .teacher_classes import read_groups, same_classes
from .weights import head_names, load_weights, read_state_dict


@dataclass(frozen=True)
class Loaded:
    """A teacher as it was trained, on the CPU in float32; its input, and its classes' names where they are known."""

    name: str
    model: nn.Module
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None

    @property
    def num_classes(self) -> int:
        return self.model.num_classes


def load(settings: Distillation, device: torch.device) -> Loaded:
    """The teacher that --teacher-model and --teacher-path name, for use on `device`. Raises UserError, or ValueError
    for weights that do not fit."""
    if settings.teacher_path is not None and Path(settings.teacher_path).is_dir():
        loaded = _own_checkpoint(checkpoint.find(settings.teacher_path), settings.teacher_input_size, device)
    else:
        loaded = _timm_model(settings.teacher_model, settings.teacher_path, settings.teacher_input_size)
    if not loaded.num_classes:
        raise UserError(
            f"the teacher {loaded.name} has no head that answers with classes: choose another, or fit one with "
            "`python -m fastdeit.teach fit --data-path DIR --model NAME`"
        )
    return loaded


def class_groups(loaded: Loaded, mapping: str | None, classes: Sequence[str]) -> list[list[int]] | None:
    """The teacher's classes for each of the data's, by the file of --teacher-classes; None where both have the same."""
    if mapping is not None:
        return read_groups(mapping, classes, loaded.classes, loaded.num_classes)
    same_classes(loaded.name, loaded.classes, loaded.num_classes, classes)
    return None


def _own_checkpoint(folder: Path, input_size: int | None, device: torch.device) -> Loaded:
    """A checkpoint folder of ours: config.json holds the model, its input and the names of its classes."""
    model, saved, _ = rebuild(folder, device, input_size=input_size)
    mean, std, classes = (tuple(saved[key]) for key in ("mean", "std", "classes"))
    return Loaded(str(folder), model, input_size or saved["input_size"], mean, std, classes)


def _timm_model(name: str, path: str | None, input_size: int | None) -> Loaded:
    import timm
    from timm.models import parse_model_name

    try:
        source = parse_model_name(name)[0]
    except ValueError as error:
        raise UserError(f"--teacher-model {name}: {error}") from error
    if source is None and not timm.is_model(name):
        raise UserError(f"--teacher-model {name}: {unknown_model_message(name, timm.list_models())}")
    if path is None:
        model = _published(name, input_size)
    else:
        model = create_timm(name, input_size)
        head = head_names(model)[0]
        weight = read_state_dict(_file(path)).get(f"{head}.weight")
        if weight is not None and len(weight) != model.num_classes:
            model.reset_classifier(len(weight))
        load_weights(model, path)
    mean, std = mean_std(model)
    names = (model.pretrained_cfg or {}).get("label_names") if source else None
    return Loaded(
        name if path is None else f"{name} from {path}", model,
        input_size or model.pretrained_cfg["input_size"][-1], mean, std, tuple(names) if names else None,
    )  # fmt: skip


def _published(name: str, input_size: int | None) -> nn.Module:
    try:
        return create_timm(name, input_size, pretrained=True)
    except Exception as error:  # a damaged file makes its reader stumble anywhere
        raise UserError(
            f"the published weights of the teacher {name} could not be loaded ({error.__class__.__name__}: {error}); "
            "give them as a file by --teacher-path, or fit a teacher with `python -m fastdeit.teach fit`"
        ) from error


def _file(path: str) -> Path:
    if not Path(path).is_file():
        raise UserError(f"--teacher-path {path}: there is no such file or folder")
    return Path(path)
