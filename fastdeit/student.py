"""From settings to the model that is trained: one of ours, or any timm model by name."""

from pathlib import Path

import torch
from torch import nn

from . import checkpoint
from . import model as ours
from .command import UserError
from .config import Config
from .weights import load_weights


def build_student(config: Config, num_classes: int) -> nn.Module:
    """The model the settings name, on the CPU, with `num_classes` outputs and, if asked for, loaded weights.

    Raises UserError for an unknown name, for distillation tokens a model does not have, and for weights that do not
    fit.
    """
    settings, data = config.model, config.data
    torch.manual_seed(config.run.seed)
    if is_ours(settings.model):
        model = ours.create_model(
            settings.model,
            num_classes=num_classes,
            img_size=data.input_size,
            patch_size=settings.patch_size,
            drop_path=settings.drop_path,
            attention=config.speed.attention,
        )
        if settings.pretrained and not settings.finetune:
            raise UserError(
                f"--pretrained: {settings.model} is this project's own code; give a downloaded checkpoint by --finetune"
            )
    else:
        model = build_timm_model(config, num_classes)
    if settings.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if settings.finetune:
        load_weights(model, settings.finetune, new_head=True)
    return model


def rebuild(
    folder: Path, device: torch.device, *, weights: str = "model", input_size: int | None = None
) -> tuple[nn.Module, dict, list[str]]:
    """The model of a checkpoint folder, on the CPU, to be used on `device`.

    weights: "model", or "ema" for the moving average. input_size: pixels on a side, if another than in training.
    Returns (model, what config.json says of it, sentences of weights.load_weights); raises UserError, or ValueError for
    weights that do not fit.
    """
    saved = checkpoint.description(folder)
    settings = Config.from_dict(saved["settings"])
    settings.model.finetune, settings.model.pretrained, settings.model.drop_path = None, False, 0.0
    settings.data.input_size = input_size or saved["input_size"]
    if device.type != "cuda":
        settings.speed.attention = "sdpa"  # the weights do not care, and the others need a GPU to be fast or to run
    model = build_student(settings, saved["num_classes"])
    return model, saved, load_weights(model, folder / f"{weights}.safetensors")


def is_ours(name: str) -> bool:
    return name in ours.model_names()


def build_timm_model(config: Config, num_classes: int) -> nn.Module:
    """A model of timm, with a fresh head for `num_classes`; `--pretrained` loads timm's published weights."""
    import timm

    name = config.model.model
    if not timm.is_model(name):
        raise UserError(ours.unknown_model_message(name, timm.list_models()))
    published = config.model.pretrained and not config.model.finetune  # whose weights would replace them
    options = {"num_classes": num_classes, "pretrained": published}
    if config.model.drop_path:
        options["drop_path_rate"] = config.model.drop_path
    if config.model.patch_size:
        options["patch_size"] = config.model.patch_size
    try:
        return create_timm(name, config.data.input_size, **options)
    except TypeError as error:
        for option, remedy in {"patch_size": "leave --patch-size away", "drop_path_rate": "give --drop-path 0"}.items():
            if option in str(error):
                raise UserError(f"--model {name}: timm's has no {option}; {remedy}") from error
        raise
    except (OSError, RuntimeError) as error:
        if not published:
            raise
        raise UserError(
            f"the published weights of {name} could not be loaded ({error.__class__.__name__}: {error}); download them "
            "first, give a file by --finetune, or start from random weights by --no-pretrained"
        ) from error


def create_timm(name: str, input_size: int | None, **options) -> nn.Module:
    """timm's model. A transformer is made for images of `input_size` pixels (None: its own), and timm interpolates its
    positions; a convolutional network takes any."""
    import timm

    if input_size is not None:
        try:
            return timm.create_model(name, img_size=input_size, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
    return timm.create_model(name, **options)


def mean_std(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The normalisation the model's weights expect, in [0, 1] units; ImageNet's where the model does not say."""
    settings = getattr(model, "pretrained_cfg", None) or {}
    return tuple(settings.get("mean") or (0.485, 0.456, 0.406)), tuple(settings.get("std") or (0.229, 0.224, 0.225))


def heads(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(class logits, distillation logits or None), whatever the mode the model is in."""
    if hasattr(model, "forward_heads"):
        return model.forward_heads(images)
    return model(images), None
