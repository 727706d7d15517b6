import copy

import pytest
import torch
from torch import nn

from fastdeit.config import Config
from fastdeit.errors import UserError
from fastdeit.models.deit import create_model
from fastdeit.training.nonfinite import TERMS, Guard
from fastdeit.training.optimizer import Update, average_decay, build_optimizer, parameter_groups


def test_biases_norms_tokens_and_positions_are_not_decayed():
    model = create_model("deit_nano_distilled_patch4_16", num_classes=10)
    decayed, plain = parameter_groups(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.05 and plain["weight_decay"] == 0
    undecayed = {names[id(parameter)] for parameter in plain["params"]}
    assert {"cls_token", "dist_token", "pos_embed", "norm.weight", "blocks.0.attn.qkv.bias", "head.bias"} <= undecayed
    assert {names[id(parameter)] for parameter in decayed["params"]} == {
        name for name, parameter in model.named_parameters() if name.endswith("weight") and parameter.ndim > 1
    }


def test_unknown_optimizer():
    with pytest.raises(UserError, match="choose adamw"):
        build_optimizer(create_model("deit_nano_patch4_16"), "adam", lr=1, weight_decay=0, eps=1, betas=(0.9, 0.9))


def test_the_moving_average_follows_its_warm_up():
    """At step t: average <- d average + (1 - d) weights, d = min(decay, (1 + t) / (10 + t)); here in float64."""
    model = nn.Linear(5, 4)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = build_optimizer(model, "sgd", lr=0.1, weight_decay=0.0, eps=1e-8, betas=(0.9, 0.999))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    update = Update(model, ema, optimizer, scaler, Guard(torch.device("cpu"), tolerated=0), Config())
    expected = model.weight.detach().double()
    for step, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 0.3, 0.3]):
        update.begin()
        loss = model(torch.randn(8, 5)).square().mean()
        loss.backward()
        numbers = torch.tensor([step, 0.1, average_decay(step, 0.3)], dtype=torch.float64)
        losses = loss.detach().expand(len(TERMS))
        update.apply(numbers, losses, losses)
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
        torch.testing.assert_close(ema.weight.double(), expected, rtol=1e-6, atol=1e-7)
