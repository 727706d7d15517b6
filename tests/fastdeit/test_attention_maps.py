"""Attention maps against the attention the model itself computes, and against closed forms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastdeit.models.attention_maps import attention_maps, attention_rollout, draw_attention
from fastdeit.models.deit import create_model


def model_of(kind, size=(16, 24)):
    torch.manual_seed(0)
    name = {"distilled": "deit_nano_distilled_patch4_16", "plain": "deit_nano_patch4_16"}[kind]
    model = create_model(name, num_classes=3, img_size=size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def attention_inside(model, images):
    """(B, L, H, N, N): what the model's own attention does. It is linear in v; one-hot values show its softmax."""
    seen, attend = [], model.blocks[0].attn.attend

    def spy(qkv):
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        one_hot = torch.eye(qkv.shape[1]).expand(*q.shape[:2], -1, -1)
        seen.append(F.scaled_dot_product_attention(q, k, one_hot))
        return attend(qkv)

    for block in model.blocks:
        block.attn.attend = spy
    with torch.no_grad():
        model.forward_features(images)
    for block in model.blocks:
        block.attn.attend = attend
    return torch.stack(seen, dim=1)


@pytest.mark.parametrize("kind, prefix", [("distilled", 2), ("plain", 1)])
def test_maps_are_rows_of_the_models_attention(kind, prefix):
    model = model_of(kind)
    images = torch.randn(2, 3, 16, 24)
    maps = attention_maps(model, images)
    assert maps.shape == (2, 6, 4, prefix, 4, 6) and maps.dtype == torch.float32
    expected = attention_inside(model, images)[:, :, :, :prefix, prefix:].unflatten(-1, (4, 6))
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind, prefix", [("distilled", 2), ("plain", 1)])
def test_rollout_multiplies_the_blocks(kind, prefix):
    """The last block's matrix stands leftmost: its rows are the tokens the heads read."""
    model = model_of(kind)
    images = torch.randn(1, 3, 16, 24)
    product = torch.eye(24 + prefix, dtype=torch.float64)
    for attention_HNN in attention_inside(model, images)[0].double():
        product = (attention_HNN.mean(0) + torch.eye(24 + prefix)) / 2 @ product
    rollout = attention_rollout(model, images)
    assert rollout.shape == (1, prefix, 4, 6)
    torch.testing.assert_close(rollout[0].flatten(1).double(), product[:prefix, prefix:], rtol=1e-4, atol=1e-7)


def test_rollout_of_uniform_attention():
    """A = 1/N in every block: the product of (A + I)/2 over L blocks is I/2^L + (1 - 1/2^L)/N."""
    model = model_of("plain", (16, 16))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
    rollout = attention_rollout(model, torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(rollout, torch.full((2, 1, 4, 4), (1 - 0.5**6) / 17))


@pytest.mark.parametrize("kind, panels", [("distilled", 5), ("plain", 3)])
def test_pictures(tmp_path, kind, panels):
    model = model_of(kind)
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    draw_attention(model, torch.randn(2, 3, 16, 24), (0.5,) * 3, (0.25,) * 3, paths)
    for path in paths:
        with Image.open(path) as picture:
            assert picture.size == (240 * panels, 300)
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_training_mode_is_a_mistake_of_ours():
    with pytest.raises(AssertionError):
        attention_maps(model_of("plain").train(), torch.randn(1, 3, 16, 24))
