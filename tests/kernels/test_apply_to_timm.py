"""apply_to_timm: the same model, faster; what it cannot replace it names."""

import copy
import logging
import pickle
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from fastdeit.kernels import apply_to_timm

timm = pytest.importorskip("timm", minversion="1.0.31")
TINY = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=5)


def tiny(**changes) -> nn.Module:
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(**(TINY | changes))
    for parameter in model.parameters():  # zero biases and unit norms would hide a mistake
        nn.init.normal_(parameter, std=0.2)
    return model


def logits_and_gradients(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = model(images)
    logits = logits if isinstance(logits, torch.Tensor) else torch.stack(logits)
    logits.square().mean().backward()
    return {"logits": logits} | {name: p.grad.clone() for name, p in model.named_parameters()}


def attention_ops(function) -> list[str]:
    """The fused operators that run in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return [event.name for event in profile.events() if event.name.startswith("fastdeit::attention")]


VARIANTS = {
    "vit": dict(qkv_bias=True),
    "no bias": dict(qkv_bias=False),
    "qk_norm": dict(qk_norm=True),
    "scale_norm": dict(scale_attn_norm=True),
    "head_dim 128": dict(embed_dim=128, num_heads=1),
    "registers": dict(reg_tokens=3, no_embed_class=True),
    "gated": dict(),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [False, True])
def test_results_and_gradients_stay(variant, training):
    model = tiny(**VARIANTS[variant])
    if variant == "gated":
        for block in model.blocks:
            block.attn.gate = nn.Linear(64, 64)
    model = model.double().train(training)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    state, before = copy.deepcopy(model.state_dict()), logits_and_gradients(model, images)
    report = apply_to_timm(model)
    assert report.replaced == ["blocks.0.attn", "blocks.1.attn"] and not report.kept
    after = logits_and_gradients(model, images)
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-9, atol=1e-11, msg=name)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    operator = "attention" if variant == "qk_norm" else "attention_qkvpacked"
    ran = attention_ops(lambda: model(images))
    assert ran == [f"fastdeit::{operator}"] * 2


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "vit_tiny_patch16_224"])
def test_registered_models(name):
    model = timm.create_model(name, img_size=48, num_classes=7).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        before = model(images)
        report = apply_to_timm(model)
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)
    assert len(report.replaced) == len(model.blocks) and not report.kept
    assert str(report) == "fastdeit attention: 12 of 12 attention layers replaced"


def test_compiles_without_a_graph_break():
    model = tiny().double()
    apply_to_timm(model)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    eager = logits_and_gradients(model, images)
    compiled = logits_and_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), images)
    assert len(compiled) == len(eager)
    for key in compiled:
        torch.testing.assert_close(compiled[key], eager[key.removeprefix("_orig_mod.")], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("masked", [dict(is_causal=True), dict(attn_mask=True)])
def test_masks_are_biases_and_causality_takes_timm_path(masked):
    model, images = tiny().eval(), torch.randn(2, 3, 32, 32)
    if "attn_mask" in masked:
        masked = dict(attn_mask=torch.rand(17, 17) < 0.7 + torch.eye(17))
    with torch.no_grad():
        before = model.forward_features(images, **masked)
        assert not torch.allclose(before, model.forward_features(images))
        apply_to_timm(model)
        torch.testing.assert_close(model.forward_features(images, **masked), before)
        served = attention_ops(lambda: model.forward_features(images, **masked))
        assert served == ["fastdeit::attention_bias"] * (2 if "attn_mask" in masked else 0)


def test_dropout_turned_on_later_is_not_lost():
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    apply_to_timm(model)
    for block in model.blocks:
        block.attn.attn_drop.p = 0.5
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_more_tokens_than_the_kernels_take(monkeypatch):
    model, images = tiny().eval(), torch.randn(1, 3, 32, 32)
    apply_to_timm(model)
    assert attention_ops(lambda: model(images))
    monkeypatch.setattr("fastdeit.kernels.integrations.report.offsets_fit", lambda *shape: False)
    assert not attention_ops(lambda: model(images))


def test_copies_pickles_and_second_call(caplog):
    model, images = tiny().eval(), torch.randn(1, 3, 32, 32)
    with caplog.at_level(logging.INFO, logger="fastdeit.kernels"):
        report = apply_to_timm(model)
    assert "2 of 2 attention layers replaced" in caplog.text
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), model(images))
        assert attention_ops(lambda other=other: other(images))
    assert apply_to_timm(model) == report
    assert all(isinstance(block.attn, timm.layers.Attention) for block in model.blocks)


def test_feature_extraction_still_traces():
    model, images = tiny().eval(), torch.randn(1, 3, 32, 32)
    apply_to_timm(model)
    features = timm.models.create_feature_extractor(model, {"blocks.1.attn": "attn"})(images)["attn"]
    assert features.shape == (1, 17, 64)


def unfused(model):
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


LEFT_ALONE = {
    "attention dropout 0.1": lambda: tiny(attn_drop_rate=0.1),
    "head_dim 8": lambda: tiny(num_heads=8),
    "head_dim 136": lambda: tiny(embed_dim=272),
    "GPSA does not call": lambda: timm.create_model("convit_tiny", depth=2, local_up_to_layer=2),
    "fused_attn turned off": lambda: unfused(timm.create_model("eva02_tiny_patch14_224", depth=2)),
}


@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_left_alone_and_named(reason, caplog):
    model = LEFT_ALONE[reason]().eval()
    kinds = [type(module) for module in model.modules()]
    report = apply_to_timm(model)
    assert not report.replaced and list(report.kept) == ["blocks.0.attn", "blocks.1.attn"]
    assert all(reason in why for why in report.kept.values())
    assert [type(module) for module in model.modules()] == kinds
    assert "0 of 2" in str(report) and "blocks.0.attn, blocks.1.attn" in str(report) and reason in str(report)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_only_what_can_be_replaced_is():
    model = tiny()
    model.blocks[0].attn.attn_drop.p = 0.1
    attn = model.blocks[1].attn
    attn.forward = types.MethodType(type(attn).forward, attn)
    report = apply_to_timm(tiny())
    assert len(report.replaced) == 2
    report = apply_to_timm(model)
    assert set(report.kept) == {"blocks.0.attn", "blocks.1.attn"} and "somebody else" in report.kept["blocks.1.attn"]
    assert str(apply_to_timm(nn.Linear(1, 1))) == "fastdeit attention: found no attention layers"


def test_works_without_timm_until_called():
    script = """
import sys
sys.modules["timm"] = None
import torch
import fastdeit.kernels
try:
    fastdeit.kernels.apply_to_timm(torch.nn.Linear(1, 1))
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'timm>=1.0.31'" in done.stdout
