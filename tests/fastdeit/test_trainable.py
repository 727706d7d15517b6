"""--freeze, --attn-only, --layer-decay: which parameters learn, which stay to the last bit, and how fast each is."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdeit import train
from fastdeit.config import Config, Model
from fastdeit.distributed.world import World
from fastdeit.errors import UserError
from fastdeit.models.deit import create_model
from fastdeit.models.trainable import depths, freeze
from fastdeit.training.nonfinite import TERMS
from fastdeit.training.optimizer import parameter_groups
from fastdeit.training.trainer import Trainer

from . import runs
from .conftest import refused

timm = pytest.importorskip("timm")
NANO = "deit_nano_distilled_patch4_16"
HEADS = {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
STEM = {"cls_token", "dist_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def learning(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def of_block(model, i: int) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(f"blocks.{i}.")}


# What keeps its weights: STEM, and the blocks below `blocks`.
@pytest.mark.parametrize(("settings", "blocks"), [({"freeze": 0}, 0), ({"freeze": 4}, 4), ({"freeze": 6}, 6)])
def test_the_first_blocks_are_frozen(settings, blocks):
    model = create_model(NANO, num_classes=3)
    (said,) = freeze(model, Model(model=NANO, **settings))
    later = set().union(*(of_block(model, i) for i in range(blocks, 6)))
    norm = {"norm.weight", "norm.bias"} if blocks < 6 else set()  # it belongs to the last block
    assert learning(model) == later | norm | HEADS
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert said == f"--freeze {blocks}: {count / 1e6:.2f} of 1.20 M parameters learn"


def test_the_backbone_is_all_but_the_heads():
    model = create_model(NANO, num_classes=3)
    freeze(model, Model(freeze="backbone"))
    assert learning(model) == HEADS
    model = timm.create_model("test_resnet", num_classes=3)
    freeze(model, Model(freeze="backbone"))
    assert learning(model) == {"fc.weight", "fc.bias"}


def test_attention_only_is_that_of_the_original():
    """facebookresearch/deit main.py, --attn-only: names with .attn., the head, pos_embed; here the second head too."""
    model = create_model("deit3_small_patch16_224", num_classes=3)
    freeze(model, Model(attn_only=True))
    attention = [f"attn.{layer}.{kind}" for layer in ("qkv", "proj") for kind in ("weight", "bias")]
    expected = {f"blocks.{i}.{name}" for i in range(12) for name in attention}
    assert learning(model) == expected | {"pos_embed", "head.weight", "head.bias"}
    model = create_model(NANO)
    freeze(model, Model(attn_only=True))
    assert HEADS <= learning(model) and not learning(model) & (STEM - {"pos_embed"})


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "test_resnet"])
def test_layer_decay_is_timms(name):
    """Learning rate and weight decay of every parameter, as timm.optim gives them to its own model of this name."""
    from timm.optim import param_groups_layer_decay

    theirs = timm.create_model(name)
    ours = theirs if name == "test_resnet" else create_model(name)
    skip = theirs.no_weight_decay() if hasattr(theirs, "no_weight_decay") else ()
    groups = {
        "timm": (theirs, param_groups_layer_decay(theirs, 0.3, skip, layer_decay=0.7)),
        "ours": (ours, parameter_groups(ours, 0.3, 0.7)),
    }
    found = {}
    for who, (model, made) in groups.items():
        names = {id(parameter): one for one, parameter in model.named_parameters()}
        found[who] = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in made for p in g["params"]}
        assert len(found[who]) == sum(len(group["params"]) for group in made) == len(names)
    assert found["ours"] == found["timm"]
    assert groups["ours"][1][0]["lr_scale"] == 1


def test_a_block_has_the_rate_of_its_depth():
    depth = depths(create_model("deit_tiny_distilled_patch16_224"))
    assert {depth[name] for name in STEM} == {0} and {depth[name] for name in HEADS} == {13}
    assert (depth["blocks.0.norm1.bias"], depth["blocks.11.mlp.fc2.weight"], depth["norm.weight"]) == (1, 12, 12)
    groups = parameter_groups(create_model("deit_tiny_distilled_patch16_224"), 0.05, 0.5)
    assert [group["lr_scale"] for group in groups] == [0.5**i for i in range(14) for _ in ("decayed", "not")]


def trainer(model, **optimization) -> Trainer:
    config = Config()
    config.data.input_size, config.data.batch_size, config.model.model_ema_decay = 16, 8, 0.5
    for name, value in {"unscale_lr": True, "warmup_epochs": 0, "weight_decay": 0.3, **optimization}.items():
        setattr(config.optimization, name, value)
    return Trainer(config, World(torch.device("cpu")), model, None, steps_per_epoch=10)


def take_steps(trainer: Trainer, count: int) -> None:
    trainer.model.train()
    for _ in range(count):
        trainer.update.begin()
        images = torch.randn(8, 3, 16, 16)
        loss = torch.nn.functional.cross_entropy(trainer.model(images), torch.arange(8) % 3)
        loss.backward()
        losses = loss.detach().expand(len(TERMS))
        trainer.update.apply(trainer.inputs(None).numbers, losses, losses)
        trainer.state.step += 1


@pytest.mark.parametrize("opt", ["adamw", "lamb", "sgd"])
def test_what_is_frozen_stays_to_the_last_bit(opt):
    """With weight decay, momentum and a moving average; what learns moves, in the average too."""
    model = create_model(NANO, num_classes=3)
    freeze(model, Model(freeze=3))
    before = copy.deepcopy(model.state_dict())
    learner = trainer(model, opt=opt, lr=0.1, layer_decay=0.9)
    take_steps(learner, 3)
    for name, tensor in before.items():
        for now in (learner.model.state_dict()[name], learner.ema.state_dict()[name]):
            assert torch.equal(now, tensor) == (name not in learning(model)), name
    assert len(learner.optimizer.state) == len(learning(model))
    assert all(p.grad is None for name, p in model.named_parameters() if name not in learning(model))


def test_the_rate_reaches_the_weights():
    """SGD's first step with Nesterov momentum is -1.9 lr g, with --lr times layer_decay^depth below the heads."""
    model = create_model(NANO, num_classes=3)
    learner = trainer(model, opt="sgd", lr=100.0, layer_decay=0.5, weight_decay=0.0)
    before, gradients = copy.deepcopy(model), {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: gradients.__setitem__(name, grad.clone()))
    take_steps(learner, 1)
    for name, parameter in model.named_parameters():
        moved = dict(before.named_parameters())[name] - parameter
        expected = 190 * 0.5 ** (7 - depths(model)[name]) * gradients[name]
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=2e-6, msg=name)


def test_frozen_batch_norms_keep_their_statistics():
    model = timm.create_model("test_resnet", num_classes=3).eval()
    freeze(model, Model(model="test_resnet", freeze=2))  # of four stages
    images = torch.randn(8, 3, 32, 32)
    twin = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    twin.train()
    assert twin.layer4[0].bn1.training and not twin.layer2[0].bn1.training
    assert not model.layer4[0].bn1.training, "a copy trains itself"
    with torch.no_grad():
        features = [part.forward_intermediates(images, indices=[2])[1][0] for part in (model, twin)]
    torch.testing.assert_close(*features)  # of the frozen stages, normalised by the statistics they had
    changed = {name for name, tensor in twin.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith(("layer3", "layer4")) for name in changed)
    assert not any(module.training for module in twin.eval().modules())


def test_refusals(cli, tmp_path):
    save_file(create_model(NANO).state_dict(), tmp_path / "weights.safetensors")
    weights = ["--finetune", tmp_path / "weights.safetensors", "--model", NANO]
    for arguments, words in (
        (["--freeze", 3], ["--freeze 3", "--finetune CHECKPOINT"]),
        (["--attn-only"], ["--attn-only", "--finetune CHECKPOINT"]),
        ([*weights, "--freeze", "backbone", "--attn-only"], ["give one of them"]),
        ([*weights, "--freeze", -1], ["--freeze -1", "at least 0"]),
        ([*weights, "--layer-decay", 1.5], ["--layer-decay 1.5", "at most 1"]),
    ):
        refused(cli, train.main, *arguments, "--print-config", words=words)
    with pytest.raises(UserError, match=r"--freeze 7: .* has 6 blocks"):
        freeze(create_model(NANO), Model(model=NANO, freeze=7))
    with pytest.raises(UserError, match="test_resnet has no attention"):
        freeze(timm.create_model("test_resnet"), Model(model="test_resnet", attn_only=True))


def test_a_frozen_balanced_run_resumes_to_the_same_bits(run, colors, monkeypatch, tmp_path):
    flags = [*runs.RANDOM, "--data-path", colors, "--finetune", run, "--freeze", 2, "--layer-decay", 0.7]
    flags += ["--class-balance", 1]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    runs.run(*flags, "--output-dir", whole)
    runs.run_until(monkeypatch, 4, *flags, "--output-dir", stopped)
    runs.run("--resume", stopped)
    runs.assert_same(whole, stopped)
    began, ended = load_file(run / "last/model.safetensors"), load_file(whole / "last/ema.safetensors")
    frozen = [name for name in began if name in STEM or name.startswith(("blocks.0.", "blocks.1."))]
    assert all(torch.equal(began[name], ended[name]) for name in frozen)
    assert not torch.equal(began["blocks.2.mlp.fc1.weight"], ended["blocks.2.mlp.fc1.weight"])
