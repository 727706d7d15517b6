"""LAMB against timm's, whose formula it shares."""

import pytest
import torch
from timm.optim import Lamb as TimmLamb
from torch import nn

from fastdeit.training.lamb import Lamb


def models():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    nn.init.zeros_(model[1].weight)  # norm 0: the ratio is 1
    other = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    other.load_state_dict(model.state_dict())
    return model, other


def groups(model):
    return [
        {"params": [model[0].weight, model[1].weight], "weight_decay": 0.05},
        {"params": [model[0].bias, model[1].bias], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])  # the last is clipped
def test_the_steps_of_timm(scale):
    ours, theirs = models()
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8}
    optimizers = Lamb(groups(ours), **options), TimmLamb(groups(theirs), **options)
    for step in range(5):
        for model, optimizer in zip((ours, theirs), optimizers):
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = scale * torch.randn_like(parameter)
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (step + 1)
            optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)  # the count and the rate are float32


def test_a_first_step_that_is_left_out():
    model, _ = models()
    optimizer = Lamb(groups(model), lr=0.01)
    before = [parameter.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters()))
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not torch.equal(before[0], model[0].weight)
