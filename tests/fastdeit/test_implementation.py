"""Every way in which a DeiT can be computed: the same values and gradients, the same names of weights."""

import copy
import importlib.machinery
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdeit.models import implementation
from fastdeit.models.deit import Block, DeiT, create_model
from fastdeit.models.implementation import ATTENTION, Implementation

NANO = "deit_nano_distilled_patch4_16"
DEIT3 = "deit3_small_patch16_224"


def formula(q, k, v):
    return ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("name", ["sdpa", "fused", "math", "flash"])
@pytest.mark.parametrize("first", [None, 2])
def test_attention_against_the_formula(name, first):
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 3, 4, 16)
    q, k, v = (qkv[:, :, i].transpose(1, 2).double() for i in range(3))
    got = ATTENTION[name](qkv) if first is None else ATTENTION[name](qkv, first)
    torch.testing.assert_close(got.double(), formula(q[:, :, :first], k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_a_backend_is_that_one_and_no_other(name):
    """Where it has no kernel, as on a CPU, it does not fall back silently: tuning must know what it times."""
    with pytest.raises(RuntimeError, match=r"No available kernel|No viable backend"):
        ATTENTION[name](torch.randn(2, 5, 3, 4, 16))


def lively(name, **options):
    """A model whose blocks all matter, with LayerScale far from 0."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, drop_path=0.3, **options).train()
    del model.blocks[2:]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def outputs_and_gradients(model, images, noise, autocast=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model.forward_heads(images, noise)
    logits = [x.float() for x in logits if x is not None]
    sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in logits).backward()
    return [*logits, *(p.grad for p in model.parameters())]


WAYS = [
    Implementation("math", "math"),
    Implementation("fused", "fused"),
    Implementation(fused_norm=True),
    Implementation(fused_gelu=True),
    Implementation(fused_mlp=True),
    Implementation("fused", "sdpa", fused_norm=True, fused_gelu=True),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name, options", [(NANO, {}), (DEIT3, {"img_size": 32})])
def test_every_way_gives_the_same(name, options, way):
    model = lively(name, **options).double()
    model.arch = model.arch.__class__(**{**vars(model.arch), "depth": len(model.blocks)})
    torch.manual_seed(1)
    images, noise = torch.randn(4, 3, *model.img_size, dtype=torch.float64), torch.rand(4, 2, 2)
    expected = outputs_and_gradients(model, images, noise)
    names = list(model.state_dict())
    other = copy.deepcopy(model)
    other.implement(way)
    assert other.implementation == way and list(other.state_dict()) == names
    for got, right in zip(outputs_and_gradients(other, images, noise), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_in_half_precision_errors_are_no_larger():
    """Under autocast: ours against float64, beside plain PyTorch's against the same."""
    model = lively(NANO)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    model.arch = model.arch.__class__(**{**vars(model.arch), "depth": len(model.blocks)})
    torch.manual_seed(1)
    images, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 2, 2)
    exact = outputs_and_gradients(copy.deepcopy(model).double(), images.double(), noise.double())
    errors = []
    for way in (Implementation(), Implementation(fused_norm=True, fused_gelu=True), Implementation(fused_mlp=True)):
        model.implement(way)
        got = outputs_and_gradients(model, images, noise, autocast=True)
        errors.append([(a.double() - b).norm() / b.norm() for a, b in zip(got, exact, strict=True)])
    plain, *ours = (torch.stack(one).mean() for one in errors)
    assert all(one <= 1.1 * plain + 1e-4 for one in ours)


def test_fusions_are_used(monkeypatch):
    """Else every test here would pass with flags that nobody reads."""
    from fastdeit.models import deit

    calls = []

    def counted(name):
        original = getattr(deit, name)
        monkeypatch.setattr(deit, name, lambda *a, **k: (calls.append(name), original(*a, **k))[1])

    counted("add_layer_norm")
    counted("bias_gelu")
    counted("mlp")
    model, images = create_model(NANO).eval(), torch.randn(1, 3, 16, 16)
    model(images)
    assert calls == []
    model.implement(Implementation(fused_norm=True))
    model(images)
    assert calls == ["add_layer_norm"] * 6
    model.implement(Implementation(fused_gelu=True))
    model(images)
    assert calls[6:] == ["bias_gelu"] * 6
    model.implement(Implementation(fused_gelu=True, fused_mlp=True))
    model(images)
    assert calls[12:] == ["mlp"] * 6


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block(32, 2, layer_scale=True)
    holder = types.SimpleNamespace(blocks=[block])
    x, scale = torch.randn(2, 7, 32), torch.rand(2, 2)
    for fused_mlp in (False, True):
        DeiT.implement(holder, Implementation("math", "fused", True, True, fused_mlp))
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        for first in (None, 2):
            torch.testing.assert_close(compiled(x, scale, first), block(x, scale, first))


def test_the_last_block_has_its_own():
    model = create_model(NANO)
    model.implement(Implementation("fused", "math"))
    assert {block.attn.attend for block in model.blocks} == {ATTENTION["fused"]}
    assert model.blocks[-1].attn.attend_first is ATTENTION["math"]
    model.set_attention("sdpa")
    assert model.implementation == Implementation()


def test_what_is_unknown_or_missing(monkeypatch):
    model = create_model(NANO)
    with pytest.raises(ValueError, match="attention='fast' is unknown; choose one of sdpa, fused"):
        model.set_attention("fast")
    monkeypatch.setattr(implementation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs xformers: pip install 'fastdeit\[xformers\]', or use"):
        model.set_attention("xformers")
    with pytest.raises(ValueError, match="attention='fa3' needs flash_attn_interface"):
        model.implement(Implementation("sdpa", "fa3"))
    assert model.implementation == Implementation()  # as it was


def test_candidates(monkeypatch):
    assert implementation.candidates(torch.device("cpu")) == ["sdpa", "math"]
    monkeypatch.setattr(implementation, "installed", lambda name: name == "xformers")
    expected = ["sdpa", "fused", "flash", "cudnn", "efficient", "xformers"]
    assert implementation.candidates(torch.device("cuda")) == expected


@pytest.mark.skipif(not hasattr(nn.attention, "activate_flash_attention_impl"), reason="this PyTorch has none")
def test_flash_is_who_it_says(monkeypatch):
    """FlashAttention-3 serves "fa3", and "flash" is PyTorch's own again."""
    active = []

    def register():
        active.append("FA3")
        return types.SimpleNamespace(remove=active.clear)

    module = types.ModuleType("flash_attn_interface")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    monkeypatch.setitem(nn.attention._registry._FLASH_ATTENTION_IMPLS, "FA3", register)
    try:
        model = create_model(NANO)
        model.set_attention("fa3")
        model.set_attention("fused")
        assert active == ["FA3"]  # another model's may need it
        model.set_attention("flash")
        assert active == []
    finally:
        nn.attention.restore_flash_attention_impl(_raise_warn=False)


def test_math_is_not_flash():
    """The CPU has both, so that one can see the context do something."""
    qkv = torch.randn(1, 9, 3, 2, 16)
    with torch.profiler.profile() as seen:
        ATTENTION["math"](qkv)
    math = {event.name for event in seen.events()}
    with torch.profiler.profile() as seen:
        F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
    assert "aten::_scaled_dot_product_attention_math" in math
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in {event.name for event in seen.events()}
