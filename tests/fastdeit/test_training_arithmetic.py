"""The trainer beside a loop of plain PyTorch in float64 (reference_loop.py): weights, moments, moving average, learning
rate and losses after every step."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fastdeit.config import Config
from fastdeit.distributed.world import World
from fastdeit.models.architectures import Architecture
from fastdeit.models.deit import DeiT
from fastdeit.pipelines import Batch, Mix, SyntheticIndex
from fastdeit.training.loop import Loop
from fastdeit.training.trainer import Trainer

from . import reference_loop
from .reference_loop import Recipe

CLASSES, SIZE, BATCH, EPOCHS, STEPS = 5, 8, 8, 2, 4  # of so many steps each


class Loader(list):
    """Batches that are in memory."""

    index = SyntheticIndex(images=100, classes=CLASSES)
    plans = SimpleNamespace(batch_size=BATCH)

    def set_epoch(self, epoch): ...


def batches(*, mixed=True, unlabelled=False) -> Loader:
    """Noise to learn by heart; mixup and cutmix by turns, neighbours with each other."""
    noise, made = np.random.default_rng(0), Loader()
    for step in range(STEPS):
        pixels = torch.from_numpy(noise.integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8))
        labels = torch.from_numpy(noise.integers(0, CLASSES, BATCH))
        if unlabelled:
            labels[:2] = -100
        partner, box = torch.arange(BATCH), torch.zeros(BATCH, 4, dtype=torch.int32)
        lam = torch.ones(BATCH)
        if mixed:
            partner = partner ^ 1
            lam[2:] = 0.7 if step % 2 else 1 - 6 / SIZE**2
            box[2:] = torch.tensor([0, 0, 0, 0] if step % 2 else [1, 2, 3, 5])
        nothing = torch.zeros(BATCH, 4, dtype=torch.int32), torch.zeros(BATCH, dtype=torch.int64)
        made.append(Batch(pixels, labels, torch.arange(BATCH), Mix(partner, lam, box, *nothing)))
    return made


def deit(*, distilled=True, deit3=False):
    torch.manual_seed(0)
    shape = Architecture(width=16, depth=2, heads=2, patch_size=4, img_size=SIZE, distilled=distilled, deit3=deit3)
    model = DeiT(shape, num_classes=CLASSES, img_size=(SIZE, SIZE), drop_path=0.0, attention="sdpa")
    for parameter in model.parameters():  # large enough for every gradient to count
        nn.init.normal_(parameter, std=0.3)
    return model


class Convolutional(nn.Sequential):
    """With running statistics, which the moving average takes as they are."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(288, CLASSES))


class Teacher:
    """Decides by a linear map of the pixels."""

    fingerprint = "linear"

    def __init__(self):
        self.weight = torch.randn(3 * SIZE * SIZE, CLASSES, generator=torch.Generator().manual_seed(1)) / 10

    def __call__(self, x, batch=None):
        return x.flatten(1) @ self.weight.to(x)


# name: the model, the reference's recipe, and where the trainer's settings are not that recipe in other words.
CASES = {
    "labels, both heads averaged": (
        deit,
        {
            "smoothing": 0.1,
            "eps": 1e-3,
            "weight_decay": 0.5,
            "betas": (0.8, 0.95),
            "ema_decay": 0.25,
            "warmup_lr": 1e-3,
            "min_lr": 3e-3,
        },
        {},
    ),
    "hard, accumulated, clipped": (deit, {"kind": "hard", "alpha": 0.3, "clip": 0.5, "eps": 1e-3}, {"accumulate": 2}),
    "soft, accumulated": (
        deit,
        {"kind": "soft", "alpha": 0.7, "tau": 3.0, "smoothing": 0.2, "eps": 1e-3},
        {"accumulate": 4},
    ),
    "soft as the original divides it": (
        deit,
        {"kind": "soft", "tau": 2.0, "divided_by_classes": True, "eps": 1e-3},
        {},
    ),
    "hard, one head, some without labels": (
        lambda: deit(distilled=False),
        {"kind": "hard", "smoothing": 0.1, "eps": 1e-3},
        {"unlabelled": True, "accumulate": 2},
    ),
    "sgd": (deit, {"opt": "sgd", "weight_decay": 0.1, "smoothing": 0.1}, {}),
    "sgd, hard, accumulated, clipped": (deit, {"opt": "sgd", "kind": "hard", "clip": 0.5}, {"accumulate": 2}),
    "lamb, binary, layer scale": (
        lambda: deit(distilled=False, deit3=True),
        {"opt": "lamb", "binary": True, "eps": 1e-4, "weight_decay": 0.2, "betas": (0.8, 0.95)},
        {},
    ),
    "lamb, soft, accumulated, clipped by itself": (
        deit,
        {"opt": "lamb", "kind": "soft", "tau": 2.0, "eps": 1e-4},
        {"accumulate": 2},
    ),
    "muon, soft, accumulated, clipped": (
        deit,
        {"opt": "muon", "kind": "soft", "tau": 2.0, "clip": 0.5, "eps": 1e-3, "weight_decay": 0.5},
        {"accumulate": 2},
    ),
    "running statistics": (Convolutional, {"smoothing": 0.1, "eps": 1e-3}, {"mixed": False}),
    "no warm-up": (deit, {"warmup_steps": 0, "smoothing": 0.1, "eps": 1e-3}, {}),
    "rate scaled with the batch": (deit, {"smoothing": 0.1, "eps": 1e-3}, {"scaled": True}),
}


def settings_of(recipe: Recipe, *, accumulate=1, scaled=False) -> Config:
    """The recipe in the words of the trainer's settings."""
    config = Config()
    config.data.batch_size, config.data.input_size = BATCH // accumulate, SIZE
    config.model.model_ema_decay = recipe.ema_decay
    distillation, optimization = config.distillation, config.optimization
    distillation.distillation_type, distillation.distillation_alpha = recipe.kind, recipe.alpha
    distillation.distillation_tau = recipe.tau
    distillation.distillation_reduction = "numel" if recipe.divided_by_classes else "batchmean"
    optimization.epochs, optimization.accumulate, optimization.opt = EPOCHS, accumulate, recipe.opt
    share, optimization.unscale_lr = (BATCH / 512 if scaled else 1), not scaled  # of a batch of 512: all three shrink
    optimization.lr, optimization.min_lr = recipe.peak / share, recipe.min_lr / share
    optimization.warmup_epochs, optimization.warmup_lr = recipe.warmup_steps / STEPS, recipe.warmup_lr / share
    optimization.weight_decay, optimization.opt_eps = recipe.weight_decay, recipe.eps
    optimization.opt_betas, optimization.clip_grad = recipe.betas, recipe.clip
    optimization.smoothing, optimization.bce_loss = recipe.smoothing, recipe.binary
    config.run.device = "cpu"
    return config


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_that_of_the_formulas(name):
    make, changes, how = CASES[name]
    how = dict(how)
    seen = batches(mixed=how.pop("mixed", True), unlabelled=how.pop("unlabelled", False))
    recipe = Recipe(**{"total_steps": EPOCHS * STEPS, "peak": 0.02, "warmup_steps": 3, "ema_decay": 0.9, **changes})
    teacher = None if recipe.kind == "none" else Teacher()
    model = make()
    expected = reference_loop.train(copy.deepcopy(model), [*seen] * EPOCHS, recipe, teacher)
    world = World(torch.device("cpu"))
    trainer = Trainer(settings_of(recipe, **how), world, model, teacher, steps_per_epoch=len(seen))
    trainer.model.train()
    for batch, (lr, losses, weights, moments, ema) in zip([*seen] * EPOCHS, expected, strict=True):
        assert trainer.lr() == pytest.approx(lr, rel=1e-9)
        got = trainer.step(batch)
        assert all(float(group["lr"]) == pytest.approx(lr, rel=1e-7) for group in trainer.optimizer.param_groups)
        close(got[:3], losses, "losses")
        assert trainer.model.state_dict().keys() == ema.keys() == trainer.ema.state_dict().keys()
        for key, value in trainer.ema.state_dict().items():
            close(value, ema[key], f"moving average of {key}")
        for key, parameter in trainer.model.named_parameters():
            close(parameter, weights[key], key)
            state = trainer.optimizer.state[parameter]
            names = ("momentum_buffer",) if "momentum_buffer" in state else ("exp_avg", "exp_avg_sq")
            assert len(names) == 2 or recipe.opt in ("sgd", "muon")
            for moment, value in zip(names, moments[key]):
                close(state[moment], value, f"{moment} of {key}")


def close(got, expected, what):
    """To float32's rounding over a few steps: a thousandth of the tensor's size at most."""
    expected = expected.detach()
    error = (got.detach().double() - expected).abs().max().item()
    size = expected.abs().max().item()
    assert error <= 1e-4 * size + 1e-7, f"{what}: {error} off, of {size}"


def test_what_a_checkpoint_holds_is_all_that_a_step_needs():
    """In fp16, with a scale of the gradients that is not that of the start."""
    seen = batches()

    def loop():
        config = settings_of(Recipe(total_steps=EPOCHS * STEPS, peak=0.02, ema_decay=0.5))
        config.speed.precision = "fp16"
        trainer = Trainer(config, World(torch.device("cpu")), deit(), None, steps_per_epoch=len(seen))
        trainer.model.train()
        return Loop(trainer, (seen, seen), list("abcde"), None)

    loops = loop(), loop()
    first, second = (one.trainer for one in loops)
    first.step(seen[0])
    first.scaler.update(8.0)
    loops[1].load({"description": loops[0].description() | {"step": 1}, **copy.deepcopy(first.tensors())})
    assert first.scaler.get_scale() == second.scaler.get_scale() == 8.0
    for one in (first, second):
        one.step(seen[1])
    assert (first.state.step, first.lr()) == (second.state.step, second.lr())
    for kind in ("model", "ema"):
        left, right = first.tensors()[kind], second.tensors()[kind]
        assert all(torch.equal(left[key], right[key]) for key in left)
