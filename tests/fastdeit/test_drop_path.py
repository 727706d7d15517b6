"""Stochastic depth: which branches are kept, how they are scaled, and what draws the noise."""

import pytest
import torch
from torch import nn

from fastdeit.models.deit import create_model

NANO = "deit_nano_distilled_patch4_16"


def branches(model, images):
    """Outputs of a model whose blocks add exactly 1 by attention and 100 by the MLP: the sum tells what was kept."""
    for block in model.blocks:
        block.attn = Constant(1.0)
        block.mlp = Constant(100.0)
    model.norm = nn.Identity()
    entering = model.embed(images)
    return lambda **noise: (model.forward_features(images, **noise) - entering)[:, :, 0]


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, first=None):
        return torch.full_like(x[:, :first], self.value)


def test_drop_path_follows_the_noise():
    """keep_prob falls linearly from 1 to 1 - drop_path; a branch is kept where noise < keep_prob, and scaled."""
    model = create_model(NANO, drop_path=0.5).train()
    added = branches(model, torch.zeros(3, 3, 16, 16))
    keep_prob = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    noise = torch.full((3, 6, 2), 0.75)  # sample 0: kept by blocks 0 to 2 in both branches
    noise[1, 5, 0] = 0.49  # sample 1: the last attention as well
    noise[2] = torch.tensor([0.0, 0.999])  # sample 2: every attention, and the first MLP, which is never dropped
    scaled = 1 / keep_prob
    expected = [
        101 * scaled[:3].sum(),
        101 * scaled[:3].sum() + scaled[5],
        scaled.sum() + 100,
    ]
    out = added(drop_path_noise=noise)
    torch.testing.assert_close(
        out, torch.stack(expected)[:, None].expand_as(out)
    )  # all tokens share their sample's fate


def test_drop_path_is_constant_in_deit3():
    model = create_model("deit3_small_patch16_224", img_size=16, drop_path=0.2).train()
    for block in model.blocks:
        block.ls1 = block.ls2 = nn.Identity()
    added = branches(model, torch.zeros(2, 3, 16, 16))
    noise = torch.tensor([0.79, 0.81]).view(2, 1, 1).expand(2, 12, 2)
    torch.testing.assert_close(added(drop_path_noise=noise)[:, 0], torch.tensor([12 * 101 / 0.8, 0.0]))


def test_drop_path_keeps_the_mean():
    model = create_model(NANO, drop_path=0.5).train()
    torch.manual_seed(0)
    added = branches(model, torch.zeros(4000, 3, 16, 16))
    with torch.no_grad():
        # Variance of a branch of size a: a^2 (1 - p) / p; six blocks with p = 1, .9, .8, .7, .6, .5.
        spread = (100**2 + 1) ** 0.5 * sum((1 - p) / p for p in (1, 0.9, 0.8, 0.7, 0.6, 0.5)) ** 0.5 / 4000**0.5
        assert added()[:, 0].mean().item() == pytest.approx(606, abs=5 * spread)


def test_drop_path_noise_is_the_only_randomness():
    torch.manual_seed(0)
    model = create_model(NANO, drop_path=0.5).train()
    images, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 6, 2)
    generator = torch.get_rng_state()
    given = model(images, drop_path_noise=noise)[0]
    assert torch.equal(torch.get_rng_state(), generator)
    torch.manual_seed(5)
    drawn = model(images)[0]
    torch.manual_seed(5)
    torch.testing.assert_close(model(images, drop_path_noise=torch.rand(4, 6, 2))[0], drawn, rtol=0, atol=0)
    torch.testing.assert_close(model(images, drop_path_noise=noise)[0], given, rtol=0, atol=0)
    assert not torch.equal(given, drawn)
    model.eval()
    assert torch.equal(model(images, drop_path_noise=noise), model(images))


def test_drop_path_noise_of_the_wrong_shape():
    model = create_model(NANO, drop_path=0.5).train()
    with pytest.raises(ValueError, match=r"must be \(batch, depth, 2\) = \(4, 6, 2\), got \(6, 4, 2\)"):
        model(torch.zeros(4, 3, 16, 16), drop_path_noise=torch.rand(6, 4, 2))


def test_drop_path_in_bfloat16_stays_bfloat16():
    model = create_model(NANO, drop_path=0.5).train().bfloat16()
    assert model(torch.randn(2, 3, 16, 16).bfloat16())[0].dtype == torch.bfloat16
