"""The student agrees with timm's DeiT in names, values and gradients, for every model name."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from fastdeit.errors import UserError
from fastdeit.models import deit as fastdeit_model
from fastdeit.models.deit import create_model, model_names
from fastdeit.models.token_similarity import token_cosine_similarity

NANO = "deit_nano_distilled_patch4_16"


def timm_twin(name, **options):
    """The name timm has for the model, and what must be said to it."""
    if "nano" in name:
        options = {"embed_dim": 128, "depth": 6, "num_heads": 4, "patch_size": 4, "img_size": 16, **options}
        name = name.replace("nano", "tiny").replace("patch4_16", "patch16_224")
    if name.endswith("384") and not timm.is_model(name):
        options = {"img_size": 384, **options}
        name = name.replace("384", "224")
    return timm.create_model(name, **options)


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def pair(name, **options):
    """A model of ours and timm's with equal, lively weights (LayerScale at 1e-4 would hide the blocks).

    The wide ones keep two of their blocks: all blocks are of one kind, and initialising more takes long.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        ours, twin = create_model(name, num_classes=7, **options), timm_twin(name, num_classes=7, **options)
    for model in (ours, twin):
        if model.embed_dim >= 512:
            del model.blocks[2:]
        model.to_empty(device="cpu")
    state = {name: torch.randn_like(tensor) * 0.1 for name, tensor in ours.state_dict().items()}
    twin.load_state_dict(state, strict=True)
    ours.load_state_dict(twin.state_dict(), strict=True)
    return ours, twin


def small(name):
    """Options that make a model of any width cheap to run, on rectangular images."""
    patch = 4 if "nano" in name else 14 if "huge" in name else 16
    return {"img_size": (2 * patch, 3 * patch)}


# Parity with timm


@pytest.mark.parametrize("name", model_names())
def test_names_and_shapes_are_timms(name):
    with torch.device("meta"):
        assert shapes(create_model(name)) == shapes(timm_twin(name))


def test_every_timm_deit_is_ours_too():
    missing = [name for name in timm.list_models("deit*") if name not in model_names()]
    assert missing == []


@pytest.mark.parametrize("name", [name for name in model_names() if not name.endswith("384")])
def test_logits_are_timms(name):
    ours, twin = pair(name, **small(name))
    images = torch.randn(2, 3, *ours.img_size)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), twin.eval()(images), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.forward_features(images), twin.forward_features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit_nano_patch4_16"])
def test_logits_are_timms_at_full_size(name):
    ours, twin = pair(name)
    images = torch.randn(1, 3, *ours.img_size)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), twin.eval()(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [NANO, "deit_tiny_distilled_patch16_224"])
def test_both_heads_in_training(name):
    ours, twin = pair(name, **small(name))
    twin.set_distilled_training(True)
    images = torch.randn(3, 3, *ours.img_size)
    for mine, theirs in zip(ours.train()(images), twin.train()(images), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        cls_logits, dist_logits = ours.eval().forward_heads(images)
        torch.testing.assert_close(ours(images), (cls_logits + dist_logits) / 2, rtol=0, atol=0)
    ours.train().set_distilled_training(False)
    torch.testing.assert_close(ours(images), (cls_logits + dist_logits) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", [NANO, "deit_nano_patch4_16", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"]
)
def test_gradients_are_timms(name):
    """In float64, so that agreement is exact in all but the last digits, for every parameter and the images."""
    ours, twin = (model.double().train() for model in pair(name, **small(name)))
    gradients = []
    for model in (ours, twin):
        if "distilled" in name:
            model.set_distilled_training(True)
        torch.manual_seed(1)
        images = torch.randn(2, 3, *ours.img_size, dtype=torch.float64, requires_grad=True)
        outputs = model(images)
        loss = sum((o * torch.randn_like(o)).sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()} | {"images": images.grad})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, parameter
        torch.testing.assert_close(gradient, gradients[1][parameter], rtol=1e-9, atol=1e-11, msg=parameter)


# Registration


def test_timm_knows_the_names():
    assert set(timm.list_models("fastdeit_*")) == {f"fastdeit_{name}" for name in model_names()}
    model = timm.create_model(f"fastdeit_{NANO}", num_classes=3, drop_path_rate=0.2, img_size=32)
    assert isinstance(model, fastdeit_model.DeiT)
    assert (model.num_classes, model.drop_path, model.img_size) == (3, 0.2, (32, 32))
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 32, 32)
    assert (data["mean"], data["std"]) == (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    images = torch.randn(2, 3, 32, 32)
    assert model.train()(images).shape == (2, 3)  # timm's meaning: averaged until told otherwise
    model.set_distilled_training(True)
    assert len(model(images)) == 2


def test_timm_is_told_what_it_cannot_have():
    with pytest.raises(UserError, match=f"timm publishes no weights of {NANO}"):
        timm.create_model(f"fastdeit_{NANO}", pretrained=True)
    with pytest.raises(ValueError, match="in_chans must be at least 1, got 0"):
        timm.create_model(f"fastdeit_{NANO}", in_chans=0)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_base_distilled_patch16_384", "deit3_base_patch16_224"])
def test_configuration_is_timms(name):
    with torch.device("meta"):
        ours, theirs = create_model(name).default_cfg, timm.create_model(name).default_cfg
    for key in ("num_classes", "input_size", "mean", "std", "interpolation", "crop_pct", "first_conv", "classifier"):
        assert ours[key] == theirs[key], key


# Initialisation


def test_initialisation_is_deits():
    torch.manual_seed(0)
    model = create_model("deit_small_distilled_patch16_224", num_classes=100)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif name.startswith("patch_embed"):
            assert parameter.abs().max() <= (3 * 16 * 16) ** -0.5, name  # PyTorch's own for a convolution
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            count = parameter.numel()
            assert parameter.std().item() == pytest.approx(0.02, rel=5 / (2 * count) ** 0.5), name
            assert abs(parameter.mean().item()) < 5 * 0.02 / count**0.5, name
            assert parameter.abs().max().item() < 7 * 0.02, name
    assert all(m.eps == 1e-6 for m in model.modules() if isinstance(m, nn.LayerNorm))


def test_layer_scale_starts_at_1e_4():
    model = create_model("deit3_small_patch16_224", img_size=32)
    gammas = [parameter for name, parameter in model.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == 2 * 12 and all((gamma == 1e-4).all() for gamma in gammas)


def test_a_new_classifier():
    model = create_model(NANO, num_classes=4).double()
    model.reset_classifier(9)
    assert model.num_classes == 9 and model.pretrained_cfg["num_classes"] == 9
    assert shapes(model)["head.weight"] == shapes(model)["head_dist.weight"] == (9, 128)
    assert model.head.weight.dtype == torch.float64
    assert not torch.equal(model.head.weight, model.head_dist.weight)
    model.reset_classifier(0)
    assert [out.shape for out in model(torch.randn(2, 3, 16, 16).double())] == [(2, 128), (2, 128)]


# Checkpointing, compilation, attention


@pytest.mark.parametrize("name", [NANO, "deit3_small_patch16_224"])
def test_checkpointing_gives_the_same_gradients(name):
    model = create_model(name, num_classes=5, drop_path=0.3, **small(name)).train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    images = torch.randn(4, 3, *model.img_size)
    for m in (model, other):
        torch.manual_seed(3)
        outputs = m(images)
        sum(out.square().sum() for out in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    for (parameter, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, msg=parameter)


def test_checkpointing_saves_activations():
    """What autograd keeps after the forward pass, counted by its own hooks."""

    def kept(model):
        elements = 0

        def count(tensor):
            nonlocal elements
            elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(torch.zeros(8, 3, 16, 16))
        return elements

    model = create_model(NANO).train()
    plain = kept(model)
    model.set_grad_checkpointing()
    assert kept(model) < plain / 5


@pytest.mark.parametrize("per_block", [False, True])
def test_compiles_without_a_break(per_block):
    torch._dynamo.reset()
    model = create_model(NANO, num_classes=5, drop_path=0.3).train()
    images, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 6, 2)
    expected = model(images, drop_path_noise=noise)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    if per_block:
        for block in model.blocks:
            block.compile(backend=backend, fullgraph=True)
        compiled = model
    else:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
    for mine, eager in zip(compiled(images, drop_path_noise=noise), expected, strict=True):
        torch.testing.assert_close(mine, eager)
    assert len(graphs) == (2 if per_block else 1), "one for all blocks but the last"


def test_compiles_with_checkpointing():
    torch._dynamo.reset()
    model = create_model(NANO, num_classes=5, drop_path=0.3).train()
    model.set_grad_checkpointing()
    del model.blocks[2:]
    images, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 6, 2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for run in (model, compiled):
        model.zero_grad(set_to_none=True)
        sum(out.square().sum() for out in run(images, drop_path_noise=noise)).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_sdpa_is_attention():
    """Against the formula in float64."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 3, 4, 8, dtype=torch.float64)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    expected = ((q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v).transpose(1, 2)
    torch.testing.assert_close(fastdeit_model.ATTENTION["sdpa"](qkv), expected)


def test_fused_attention_is_the_same():
    model = create_model(NANO, num_classes=5).eval()
    images = torch.randn(2, 3, 16, 16)
    expected = model(images)
    model.set_attention("fused")
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    assert create_model(NANO, attention="fused").blocks[0].attn.attend is model.blocks[0].attn.attend


@pytest.mark.gpu
def test_xformers_attention_is_the_same():
    pytest.importorskip("xformers")
    model = create_model(NANO, num_classes=5, attention="xformers").eval().cuda().half()
    images = torch.randn(2, 3, 16, 16).cuda().half()
    mine = model(images)
    model.set_attention("sdpa")
    torch.testing.assert_close(mine, model(images), rtol=1e-2, atol=1e-2)


def test_xformers_on_a_cpu():
    pytest.importorskip("xformers")
    model = create_model(NANO, attention="xformers")
    with pytest.raises(ValueError, match="'xformers' runs on CUDA devices only; use attention='sdpa'"):
        model(torch.zeros(1, 3, 16, 16))


def test_xformers_missing(monkeypatch):
    monkeypatch.setattr(fastdeit_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs xformers: pip install 'fastdeit\[xformers\]'"):
        create_model(NANO, attention="xformers")


# Token similarity


def test_token_cosine_similarity():
    model = create_model(NANO, drop_path=0.5).train()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        model.dist_token.copy_(2 * model.cls_token + 2 * model.pos_embed[:, :1] - model.pos_embed[:, 1:2])
    similarity = token_cosine_similarity(model, images)
    assert similarity.shape == (7,) and model.training
    assert similarity[0].item() == pytest.approx(1, abs=1e-6)
    model.eval()
    x = model.embed(images)
    for block in model.blocks:
        x = block(x)
    expected = F.cosine_similarity(x[:, 0], x[:, 1], dim=-1).mean()
    assert similarity[6].item() == pytest.approx(expected.item(), abs=1e-6)
    with pytest.raises(ValueError, match="no distillation token"):
        token_cosine_similarity(create_model("deit_nano_patch4_16"), images)


# Bad input


def test_unknown_names_get_near_ones():
    with pytest.raises(ValueError, match="unknown model 'deit_tny_patch16_224'; did you mean deit_tiny_patch16_224 or"):
        create_model("deit_tny_patch16_224")
    with pytest.raises(ValueError, match=r"unknown model '!': see fastdeit\.models\.deit\.model_names\(\)$"):
        create_model("!")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"img_size": 18}, "images of 18 x 18 pixels do not divide into patches of 4"),
        ({"img_size": (16, 30)}, "images of 16 x 30 pixels do not divide into patches of 4"),
        ({"img_size": 0}, "images of 0 x 0 pixels"),
        ({"patch_size": 5}, "do not divide into patches of 5"),
        ({"patch_size": 0}, "do not divide into patches of 0"),
        ({"num_classes": -1}, "num_classes must be at least 1"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
        ({"drop_path": -0.1}, r"drop_path must be in \[0, 1\), got -0.1"),
        ({"attention": "fast"}, "attention='fast' is unknown; choose one of sdpa, fused, xformers"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_model(NANO, **options)


def test_images_of_another_size():
    with pytest.raises(ValueError, match="takes images of 16 x 16 pixels, got 16 x 32: resize them"):
        create_model(NANO)(torch.zeros(1, 3, 16, 32))
