"""Muon against torch.optim.Muon, whose arithmetic it has, and against singular value decompositions in float64."""

import pytest
import timm
import torch
from torch import nn

from fastdeit.config import Config
from fastdeit.errors import UserError
from fastdeit.models.build import build_student
from fastdeit.models.deit import create_model
from fastdeit.models.trainable import hidden_matrices
from fastdeit.training.muon import Muon, orthogonalise
from fastdeit.training.optimizer import build_optimizer

from .runs import RANDOM, assert_same, run, run_until

OPTIONS = {"weight_decay": 0.5, "eps": 1e-8, "betas": (0.9, 0.95)}
NANO = "deit_nano_distilled_patch4_16"


def gradients(model, step):
    torch.manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def test_the_steps_of_torch():
    """torch.optim.Muon and AdamW beside it, with queries, keys and values as three parameters."""
    torch.manual_seed(0)
    model = create_model(NANO, num_classes=10)
    names = hidden_matrices(model)
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parts = {name: nn.ParameterList(first[name].clone().chunk(count)) for name, count in names.items()}
    rest = {name: nn.Parameter(value.clone()) for name, value in first.items() if name not in names}
    plain = [value for name, value in rest.items() if value.ndim == 1 or name in model.no_weight_decay()]
    decayed = [value for value in rest.values() if not any(value is one for one in plain)]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    theirs = [
        torch.optim.Muon(
            [one for some in parts.values() for one in some], lr=0.0, weight_decay=0.5, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, lr=0.0, weight_decay=0.5, betas=(0.9, 0.95)),
    ]
    ours = build_optimizer(model, "muon", lr=0.0, **OPTIONS)
    ours.precision = torch.bfloat16  # as theirs
    for step in range(4):
        gradients(model, step)
        for name, parameter in model.named_parameters():
            for one, grad in zip(parts.get(name, [rest.get(name)]), parameter.grad.chunk(names.get(name, 1))):
                one.grad = grad
        for optimizer in (ours, *theirs):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (step + 1)
            optimizer.step()
    for name, parameter in model.named_parameters():
        moved = (parameter - first[name]).norm()
        expected = torch.cat(list(parts[name])) if name in names else rest[name]
        error = (parameter - expected).norm() / moved
        assert moved > 0 and error < (3e-3 if name in names else 1e-6), (name, error)  # products in another order


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 8, 40), (2, 40, 8)])
def test_newton_and_schulz_against_the_polar_factor(shape):
    """The vectors of the SVD are the polar factor's; the singular values are within 0.68 and 1.21 of its ones, where
    they were at least 0.002 of the norm, and have come there by five applications of the polynomial."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-4
    left, s, right = torch.linalg.svd(matrices, full_matrices=False)
    got = left.mT @ orthogonalise(matrices) @ right.mT
    values = got.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(got, torch.diag_embed(values), rtol=0, atol=1e-9)
    share = s / matrices.norm(dim=(-2, -1))[:, None]
    assert values[share > 0.002].min() > 0.67 and values.max() < 1.21
    for _ in range(5):
        share = 3.4445 * share - 4.7750 * share**3 + 2.0315 * share**5
    torch.testing.assert_close(values, share, rtol=1e-9, atol=1e-9)
    for precision, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        rough = orthogonalise(matrices.to(precision)).double()
        assert (rough - orthogonalise(matrices)).norm() / rough.norm() < error


def test_what_is_bounded_by_the_polynomial():
    """The docstring's bounds, on a grid of singular values."""
    values = torch.linspace(0.002, 1, 100_001, dtype=torch.float64)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert values.min() == pytest.approx(0.68, abs=0.01) and values.max() == pytest.approx(1.20, abs=0.01)
    assert orthogonalise(torch.zeros(1, 4, 4)).eq(0).all()  # a gradient of zeros is no division by it


def test_a_step_is_as_large_as_adamws():
    """Root mean square 0.2 or a little less per unit of the learning rate, whatever the shape."""
    for m, n in ((32, 32), (96, 24), (16, 128)):
        weight = nn.Parameter(torch.zeros(m, n))
        optimizer = Muon([{"params": [weight], "matrices": 1}], lr=1.0)
        weight.grad = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        assert 0.15 < weight.square().mean().sqrt() < 0.22


def test_which_parameters_are_matrices():
    model = create_model(NANO, num_classes=10)
    optimizer = build_optimizer(model, "muon", lr=1.0, layer_decay=0.5, **OPTIONS)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group["matrices"] for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == set(names.values())
    for name, matrices in found.items():
        inside = name.startswith("blocks.") and name.endswith("weight") and ".norm" not in name
        assert matrices == (3 if "qkv" in name else 1) * inside, name
    rates = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert rates["blocks.0.attn.qkv.weight"] == rates["blocks.0.norm1.bias"] == 0.5**6 and rates["head.weight"] == 1
    assert set(hidden_matrices(timm.create_model("test_vit"))) == {
        name for name, p in timm.create_model("test_vit").named_parameters() if p.ndim == 2 and "blocks" in name
    }
    config = Config()
    config.optimization.opt, config.model.model, config.data.input_size = "muon", "test_resnet", 32
    config.model.drop_path = 0.0
    with pytest.raises(UserError, match="--opt muon: test_resnet has no linear layer but its head: choose adamw"):
        build_student(config, 10)


def test_a_first_step_that_is_left_out():
    torch.manual_seed(0)
    model = create_model(NANO, num_classes=10)
    optimizer = build_optimizer(model, "muon", lr=0.1, **OPTIONS)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())
    gradients(model, 0)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not any(map(torch.equal, before, model.parameters()))


def test_layers_without_a_gradient_stay():
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    optimizer = build_optimizer(model, "muon", lr=0.1, **OPTIONS)
    before = model["other"].weight.detach().clone()
    model["one"](torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(model["other"].weight, before) and not model["one"].weight.isnan().any()


def test_a_resumed_run_is_the_same_to_the_bit(colors, tmp_path, monkeypatch):
    command = [*RANDOM, "--data-path", colors, "--epochs", 1, "--opt", "muon", "--layer-decay", 0.8]
    run(*command, "--output-dir", tmp_path / "straight")
    run_until(monkeypatch, 1, *command, "--output-dir", tmp_path / "stopped")
    run("--resume", tmp_path / "stopped")
    assert_same(tmp_path / "straight", tmp_path / "stopped")
