"""apply_to: any model's attention by the kernels, with the same results; calls they cannot serve run as before."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdeit.kernels import apply_to, attention_calls

MASKED = "a mask, or a bias added to the logits"
TINY = dict(img_size=32, patch_size=8, depth=2, num_classes=3)


def timm_model(name, **changes):
    timm = pytest.importorskip("timm", minversion="1.0.31")
    return timm.create_model(name, **TINY | changes)


def torchvision_model(**changes):
    torchvision = pytest.importorskip("torchvision")
    sizes = dict(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=64, num_classes=3)
    return torchvision.models.VisionTransformer(**sizes | changes)


class CrossAttention(nn.Module):
    """Somebody's own: a learned query pools the tokens."""

    def __init__(self):
        super().__init__()
        self.query, self.kv = nn.Parameter(torch.zeros(1, 3, 64)), nn.Linear(48, 128)

    def forward(self, x):
        q = self.query.expand(len(x), -1, -1).unflatten(-1, (2, 32)).transpose(1, 2)
        k, v = (
            self.kv(x.flatten(2).transpose(1, 2).repeat(1, 1, 16)).unflatten(-1, (2, 2, 32)).transpose(1, 3).unbind(2)
        )
        return F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(1)


MODELS = {  # and the calls of one forward pass
    "rotary, EvaAttention": (lambda: timm_model("eva02_tiny_patch14_224"), 2),
    "rotary, separate projections": (lambda: timm_model("eva02_base_patch14_224", embed_dim=96, num_heads=2), 2),
    "rotary, DINOv3": (lambda: timm_model("vit_small_patch16_dinov3"), 2),
    "rotary and attention pooling, PE": (lambda: timm_model("vit_pe_core_tiny_patch16_384"), 3),
    "SigLIP's head_dim of 72": (lambda: timm_model("vit_base_patch16_siglip_224", embed_dim=144, num_heads=2), 3),
    "nn.MultiheadAttention": (torchvision_model, 2),
    "somebody's own": (CrossAttention, 1),
}


def filled(model):
    torch.manual_seed(0)
    model = model.double().eval()
    for parameter in model.parameters():  # zero biases and unit norms would hide a mistake
        nn.init.normal_(parameter, std=0.1)
    return model


def run(model, *inputs, **options):
    model.zero_grad()
    out = model(*inputs, **options)
    out = out[0] if isinstance(out, tuple) else out
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", MODELS)
def test_results_and_gradients_stay(name):
    make, expected_calls = MODELS[name]
    model, images = filled(make()), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    state, before = copy.deepcopy(model.state_dict()), run(model, images)
    report = apply_to(model)
    assert len(report.replaced) == expected_calls and not report.kept
    copies = pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
    for fused in (model, *copies):
        with attention_calls() as calls:
            after = run(fused, images)
        assert calls == {"fused": expected_calls}
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-11)
        assert list(fused.state_dict()) == list(state)
    assert apply_to(model) == report


@pytest.mark.parametrize("name", ["rotary, DINOv3", "nn.MultiheadAttention", "somebody's own"])
def test_compiles_once_without_a_graph_break(name):
    model, images = filled(MODELS[name][0]()), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = run(model, images)
    apply_to(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, images), expected, rtol=1e-9, atol=1e-11)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(compiled, images)


def mha(**options):
    return filled(nn.MultiheadAttention(64, 2, **options))


def tensors(*shapes):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


QUIET = {"need_weights": False}
MASK = torch.ones(5, 5).triu(1).bool()


@pytest.mark.parametrize(
    "options, shapes, call, reason",
    [
        ({"batch_first": True}, [(2, 5, 64)], QUIET, "fused"),
        ({}, [(5, 2, 64)], QUIET, "fused"),
        ({"bias": False}, [(5, 2, 64)], QUIET, "fused"),
        ({"batch_first": True}, [(2, 3, 64), (2, 5, 64), (2, 5, 64)], QUIET, "fused"),
        ({"bias": False}, [(3, 2, 64), (5, 2, 64), (5, 2, 64)], QUIET, "fused"),
        ({}, [(5, 2, 64)], {}, "the attention weights are wanted (need_weights=True)"),
        ({}, [(5, 2, 64)], QUIET | {"attn_mask": MASK}, MASKED),
        ({}, [(5, 2, 64)], QUIET | {"attn_mask": MASK, "is_causal": True}, MASKED),
        ({}, [(5, 2, 64)], QUIET | {"key_padding_mask": MASK[:2]}, MASKED),
        ({}, [(5, 64)], QUIET, "unbatched or nested input"),
        ({"kdim": 32}, [(5, 2, 64), (5, 2, 32), (5, 2, 64)], QUIET, "keys or values of another width, or added keys"),
        ({"add_zero_attn": True}, [(5, 2, 64)], QUIET, "keys or values of another width, or added keys"),
        ({"add_bias_kv": True}, [(5, 2, 64)], QUIET, "keys or values of another width, or added keys"),
    ],
)
def test_multihead_attention(options, shapes, call, reason):
    layer, inputs = mha(**options), tensors(*shapes)
    inputs = inputs * 3 if len(inputs) == 1 else inputs
    before = run(layer, *inputs, **call)
    assert apply_to(layer).replaced == [""]
    with attention_calls() as calls:
        after = run(layer, *inputs, **call)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-11)
    assert calls == {reason: 1}


def test_dropout_runs_in_evaluation_only():
    layer = nn.MultiheadAttention(64, 2, dropout=0.5)
    x = torch.randn(5, 2, 64)
    apply_to(layer)
    with attention_calls() as calls:
        first, second = (layer(x, x, x, need_weights=False)[0] for _ in range(2))
        layer.eval()(x, x, x, need_weights=False)
    assert calls == {"attention dropout": 2, "fused": 1} and not torch.equal(first, second)


class Plain(nn.Module):
    def forward(self, q, k, v, **options):
        return F.scaled_dot_product_attention(q, k, v, **options)


@pytest.mark.parametrize(
    "shapes, options, reason",
    [
        ([(2, 2, 5, 32)] * 3, {"scale": 0.5}, "fused"),
        ([(2, 2, 5, 32)] * 3, {"is_causal": True}, "causal"),
        ([(2, 2, 5, 32)] * 3, {"attn_mask": torch.rand(5, 5, dtype=torch.float64)}, "fused"),
        ([(2, 2, 5, 32)] * 3, {"attn_mask": torch.rand(2, 1, 1, 5) < 0.7}, "fused"),
        ([(2, 5, 32)] * 3, {"attn_mask": torch.rand(2, 5, 5, dtype=torch.float64)}, "fused"),
        ([(2, 3, 2, 5, 32)] * 3, {"attn_mask": torch.rand(3, 1, 5, 5, dtype=torch.float64)}, MASKED),
        ([(2, 3, 2, 5, 32), *2 * [(2, 3, 2, 7, 32)]], {}, "fused"),
        ([(2, 5, 32)] * 3, {}, "fused"),
        ([(5, 32)] * 3, {}, "shapes"),
        ([(2, 4, 5, 32), *2 * [(2, 2, 5, 32)]], {"enable_gqa": True}, "shapes"),
        ([(4, 2, 5, 32), *2 * [(1, 2, 5, 32)]], {}, "shapes"),
        ([(2, 5, 2, 5, 32), *2 * [(5, 2, 5, 32)]], {}, "shapes"),
        ([(2, 2, 5, 32)] * 2 + [(2, 2, 5, 16)], {}, "shapes"),
        ([(2, 2, 5, 12)] * 3, {}, "head_dim 12 is not a multiple of 8 from 16 to 128"),
    ],
)
def test_each_call_is_decided_by_what_it_is_given(shapes, options, reason):
    layer, inputs = Plain(), tensors(*shapes)
    expected = layer(*inputs, **options)
    apply_to(layer)
    with attention_calls() as calls:
        torch.testing.assert_close(layer(*inputs, **options), expected)
    ((counted, times),) = calls.items()
    assert counted.startswith(reason) and times == 1


def test_a_bias_that_is_trained_gets_its_gradient():
    layer, inputs = Plain(), tensors(*[(4, 2, 5, 32)] * 3)
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(*inputs, attn_mask=bias).square().sum(), bias)
    apply_to(layer)
    (grad,) = torch.autograd.grad(layer(*inputs, attn_mask=bias).square().sum(), bias)
    torch.testing.assert_close(grad, expected)


class RelativePositions(nn.Module):
    """As timm's Swin and SAM call it: by its full name, with a bias of the layer's own."""

    def __init__(self):
        super().__init__()
        self.qkv, self.relative_position_bias = nn.Linear(64, 192), nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).transpose(1, 3).unbind(2)
        q = torch.cat([q[..., :16], q[..., 16:]], -1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.relative_position_bias)


def test_a_layer_that_calls_the_function_by_its_full_name():
    layer, inputs = RelativePositions().double(), tensors((3, 5, 64))
    before = run(layer, *inputs)
    assert apply_to(layer).replaced == [""]
    with attention_calls() as calls:
        torch.testing.assert_close(run(layer, *inputs), before, rtol=1e-9, atol=1e-11)
    assert calls == {"fused": 1}
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs), layer(*inputs))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "samvit_base_patch16"])
def test_timm_s_relative_positions(name):
    timm = pytest.importorskip("timm", minversion="1.0.31")
    model = timm.create_model(name, img_size=32, embed_dim=64, num_heads=2, depth=1, num_classes=3).double().eval()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    before = model(images)
    assert len(apply_to(model).replaced) == 1
    with attention_calls() as calls:
        torch.testing.assert_close(model(images), before, rtol=1e-9, atol=1e-11)
    assert calls == {"fused": 1}


def test_calls_outside_are_not_counted():
    layer, inputs = Plain(), tensors(*[(1, 1, 2, 16)] * 3)
    apply_to(layer)
    with attention_calls() as calls:
        pass
    layer(*inputs)
    assert not calls and str(calls) == "Counter()"


def test_a_transformers_model_goes_its_own_way():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.ViTModel(config).eval()
    assert len(apply_to(model).replaced) == 2 and model.config._attn_implementation == "fastdeit"


@pytest.mark.parametrize("kind", ["convit_tiny", "efficientvit_b0", "swin_tiny_patch4_window7_224"])
def test_what_attends_in_another_way_is_named(kind):
    timm = pytest.importorskip("timm")
    report = apply_to(timm.create_model(kind))
    assert report.kept and not report.replaced
    assert all("fused_attn turned off" in why or "does not call" in why for why in report.kept.values())
