"""Models, settings and runs written on the spot, for the tests of loading."""

import pytest
import torch

from fastdeit.checkpoint import files
from fastdeit.cli import parse_config
from fastdeit.config import Config
from fastdeit.models.build import build_student
from fastdeit.models.loading import LoadedModel

NANO, PLAIN = "deit_nano_distilled_patch4_16", "deit_nano_patch4_16"
CLASSES, MEAN, STD = ("ant", "bee", "cow"), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
HERE = torch.device("cpu")


def settings(model=NANO, size=16, **fields) -> Config:
    config = Config()
    config.model.model, config.data.input_size, config.model.drop_path = model, size, 0.0
    for name, value in fields.items():
        setattr(config.model, name, value)
    return config


def lively(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model.eval()


def write_run(folder, model=NANO, size=16, classes=CLASSES, crop=0.8, **fields):
    """A run's folder as the trainer leaves it; returns its model in eval mode."""
    config = settings(model, size, **fields)
    config.data.eval_crop_ratio = crop
    made = lively(build_student(config, len(classes))[0])
    described = files.describe(made, config, classes, MEAN, STD)
    files.save(folder, described, step=1, model=made.state_dict(), ema=None, training={})
    return made


def loaded_from(model, name) -> LoadedModel:
    """`model` as load_model would return it."""
    return LoadedModel(
        name=name, architecture=name, model=model, classes=CLASSES, input_size=16, mean=MEAN, std=STD, crop_pct=0.8,
    )  # fmt: skip


def answers(model, size):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(images)


def same(model, other, size, **tolerance):
    torch.testing.assert_close(answers(model, size), answers(other, size), **(tolerance or {"rtol": 0, "atol": 0}))


def parse_flags(*arguments) -> Config:
    pytest.importorskip("tyro")
    return parse_config([str(argument) for argument in ("--recipe", "finetune", "--data-path", "d", *arguments)])
