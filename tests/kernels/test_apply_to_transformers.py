"""attn_implementation="fastdeit" in transformers: SDPA's results, and SDPA itself where the kernels cannot serve."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastdeit.kernels import apply_to_transformers, attention_calls, register_with_transformers

transformers = pytest.importorskip("transformers")
TINY = dict(image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
CONFIGS = {
    "vit": (transformers.ViTConfig, {"intermediate_size": 64}),
    "deit": (transformers.DeiTConfig, {"intermediate_size": 64}),
    "dinov2": (transformers.Dinov2Config, {}),
    "dinov2_with_registers": (transformers.Dinov2WithRegistersConfig, {"num_register_tokens": 2}),
}


def tiny(kind: str, attn_implementation: str = "sdpa", **changes) -> nn.Module:
    config_class, extra = CONFIGS[kind]
    torch.manual_seed(0)
    config = config_class(**(TINY | extra | changes))
    model = transformers.AutoModel.from_config(config, attn_implementation=attn_implementation).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def outputs_and_gradients(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    hidden = model(pixel_values=images).last_hidden_state
    hidden.square().mean().backward()
    return {"hidden": hidden} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def fused_calls(function) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(event.name == "fastdeit::attention" for event in profile.events())


@pytest.mark.parametrize("kind", CONFIGS)
def test_results_and_gradients_stay(kind):
    model, images = tiny(kind).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    state, before = copy.deepcopy(model.state_dict()), outputs_and_gradients(model, images)
    report = apply_to_transformers(model)
    assert len(report.replaced) == 2 and not report.kept, report
    after = outputs_and_gradients(model, images)
    assert before.keys() == after.keys() and len(before) > 20
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-9, atol=1e-11, msg=name)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert fused_calls(lambda: model(pixel_values=images)) == 2


def test_fewer_keys_than_queries():
    """Segformer's attention looks at a picture of fewer tokens; each of its calls is served, and counted."""
    sizes = dict(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[32, 64], num_attention_heads=[1, 2]
    )
    lists = dict(patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], decoder_hidden_size=32)
    torch.manual_seed(0)
    model = transformers.SegformerModel(transformers.SegformerConfig(**sizes, **lists)).eval().double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = outputs_and_gradients(model, images)
    report = apply_to_transformers(model)
    assert len(report.replaced) == 2 and not report.kept, report
    with attention_calls() as calls:
        after = outputs_and_gradients(model, images)
    assert calls == {"fused": 2}
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-9, atol=1e-11, msg=name)


def test_attn_implementation_by_name():
    register_with_transformers()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = tiny("deit")(pixel_values=images).last_hidden_state
        model = tiny("deit", attn_implementation="fastdeit")
        torch.testing.assert_close(model(pixel_values=images).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "fastdeit"
    assert fused_calls(lambda: model(pixel_values=images)) == 2


def test_loads_from_disk_with_the_name(tmp_path):
    tiny("vit").save_pretrained(tmp_path)
    register_with_transformers()
    model = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="fastdeit")
    assert fused_calls(lambda: model(pixel_values=torch.randn(1, 3, 32, 32))) == 2


def test_compiles_without_a_graph_break():
    model, images = tiny("vit").double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    apply_to_transformers(model)
    eager = outputs_and_gradients(model, images)
    compiled = outputs_and_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), images)
    compiled = {key.removeprefix("_orig_mod."): value for key, value in compiled.items()}
    for key in eager:
        torch.testing.assert_close(compiled[key], eager[key], rtol=1e-9, atol=1e-11, msg=key)


def test_masks_are_biases():
    model, hidden = tiny("vit"), torch.randn(2, 17, 64)
    layer = next(module for module in model.modules() if type(module).__name__.endswith("Attention"))
    mask = torch.zeros(2, 1, 17, 17).masked_fill(torch.rand(2, 1, 17, 17) < 0.3, -1e4)
    with torch.no_grad():
        before, unmasked = layer(hidden, attention_mask=mask)[0], layer(hidden)[0]
        apply_to_transformers(model)
        torch.testing.assert_close(layer(hidden, attention_mask=mask)[0], before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(hidden)[0], unmasked, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, unmasked)
    with attention_calls() as calls:
        layer(hidden, attention_mask=mask)
    assert calls == {"fused": 1} and fused_calls(lambda: layer(hidden)) == 1


def test_relative_positions():
    config = transformers.BeitConfig(**TINY, intermediate_size=64, use_relative_position_bias=True)
    model = transformers.BeitModel(config).double().eval()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    tables = [p for name, p in parameters.items() if name.endswith("relative_position_bias_table")]
    for table in tables:
        torch.nn.init.normal_(table)

    def run():
        out = model(images).last_hidden_state
        return [out, *torch.autograd.grad(out.square().sum(), tables)]

    before = run()
    assert len(apply_to_transformers(model).replaced) == 2 and len(before) == 3
    with attention_calls() as calls:
        after = run()
    assert calls == {"fused": 2}
    torch.testing.assert_close(after, before)


def test_dropout_in_training_goes_to_sdpa():
    model, images = tiny("vit", attention_probs_dropout_prob=0.5), torch.randn(1, 3, 32, 32)
    report = apply_to_transformers(model)
    assert not report.replaced and "attention dropout 0.5" in str(report) and "in training" in str(report)
    assert fused_calls(lambda: model(pixel_values=images)) == 2
    model.train()
    assert fused_calls(lambda: model(pixel_values=images)) == 0
    first, second = (model(pixel_values=images).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)


LEFT_ALONE = {
    "head_dim 8": lambda: tiny("vit", num_attention_heads=8),
    "causal": lambda: transformers.GPT2Model(transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=8)),
}


@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_left_to_sdpa_and_named(reason):
    model = LEFT_ALONE[reason]().eval()
    inputs = torch.randint(8, (1, 17)) if reason == "causal" else torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(inputs).last_hidden_state
        report = apply_to_transformers(model)
        assert not report.replaced and len(report.kept) == 2
        assert all(reason in why for why in report.kept.values()), report
        torch.testing.assert_close(model(inputs).last_hidden_state, before, rtol=1e-4, atol=1e-5)
    assert fused_calls(lambda: model(inputs)) == 0


def test_another_library_s_model_is_refused():
    with pytest.raises(ValueError, match="not Linear"):
        apply_to_transformers(nn.Linear(1, 1))


def test_works_without_transformers_until_called():
    script = """
import sys
sys.modules["transformers"] = None
import torch
import fastdeit.kernels
for call in (fastdeit.kernels.register_with_transformers, lambda: fastdeit.kernels.apply_to_transformers(None)):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.count("pip install 'transformers>=4.56'") == 2
