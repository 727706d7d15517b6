"""From settings to the model that is trained: one of ours, or any timm model by name."""

from collections.abc import Sequence

import torch
from torch import nn

from fastdeit.config import Config
from fastdeit.errors import UserError

from . import sources
from .loading import create_model, is_ours
from .weights import load_weights


def build_student(
    config: Config, num_classes: int, classes: Sequence[str] | None = None
) -> tuple[nn.Module, list[str]]:
    """(the model the settings name, on the CPU, with `num_classes` outputs and, if asked for, loaded weights; sentences
    about these weights).

    classes: the outputs' names; a head that comes with the weights is kept only if it answers for the same.
    Raises UserError for an unknown name, for distillation tokens a model does not have, and for weights that do not
    fit.
    """
    settings = config.model
    torch.manual_seed(config.run.seed)
    pretrained = settings.pretrained and not settings.finetune  # which would be written over
    if pretrained and is_ours(settings.model):
        raise UserError(
            f"--pretrained: {settings.model} is this project's own code; give a downloaded checkpoint by --finetune"
        )
    try:
        model = create_model(
            settings.model, num_classes=num_classes, input_size=config.data.input_size, patch_size=settings.patch_size,
            drop_path=settings.drop_path, attention=config.speed.attention, pretrained=pretrained,
        )  # fmt: skip
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise UserError(
            f"the published weights of {settings.model} could not be loaded ({error.__class__.__name__}: {error}); "
            "download them first, give a file by --finetune, or start from random weights by --no-pretrained"
        ) from error
    if settings.grad_checkpointing:
        model.set_grad_checkpointing(True)
    notes = []
    if settings.finetune:
        source = sources.find(settings.finetune)
        notes = [
            f"starts from {source.weights}", *load_weights(model, source, new_head=True, classes=classes),
        ]  # fmt: skip
        if source.mean and source.std:
            normalise(model, source.mean, source.std)
    return model, notes


def normalise(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    """Feed the model, from now on, what its weights were trained on: loading.mean_std says it."""
    model.normalisation = (tuple(mean), tuple(std))
