"""Weights travel unchanged from and to timm and facebookresearch/deit, or are refused with a reason."""

import argparse
import os
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from fastdeit.checkpoint.state_dict import read_state_dict
from fastdeit.models.deit import create_model
from fastdeit.models.weights import interpolate_position_embedding, load_weights

NANO, PLAIN = "deit_nano_distilled_patch4_16", "deit_nano_patch4_16"


def small_deit3(**options):
    return create_model("deit3_small_patch16_224", num_classes=5, img_size=32, **options)


def equal(model, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def different(model):
    """The weights of another model of the same kind; none equal to the model's."""
    return {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


@pytest.fixture
def model():
    return create_model(NANO, num_classes=5)


# Reading every kind of file


@pytest.mark.parametrize("wrapper", ["bare", "model", "state_dict", "module.", "_orig_mod.", "module._orig_mod."])
def test_reads_files_of_torch_save(tmp_path, model, wrapper):
    state = different(model)
    saved = {"bare": state, "model": {"model": state}, "state_dict": {"epoch": 3, "state_dict": state}}.get(
        wrapper, {f"{wrapper}{name}": tensor for name, tensor in state.items()}
    )
    torch.save(saved, tmp_path / "weights.pth")
    assert load_weights(model, tmp_path / "weights.pth") == []
    assert equal(model, state)


def test_reads_a_training_checkpoint_of_facebookresearch(tmp_path, model):
    state, average = different(model), different(model)
    saved = {
        "model": state,
        "model_ema": average,
        "epoch": 7,
        "optimizer": {"state": {}},
        "args": argparse.Namespace(lr=1),
    }
    torch.save(saved, tmp_path / "checkpoint.pth")
    load_weights(model, tmp_path / "checkpoint.pth")
    assert equal(model, state)
    load_weights(model, tmp_path / "checkpoint.pth", ema=True)
    assert equal(model, average)


def test_reads_deit3_of_facebookresearch(tmp_path):
    """Its LayerScale is called gamma_1 and gamma_2; the values must land in ls1 and ls2."""
    model = small_deit3()
    state = different(model)
    theirs = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for name, t in state.items()}
    assert "blocks.3.gamma_2" in theirs
    torch.save({"model": theirs}, tmp_path / "deit_3_small.pth")
    load_weights(model, tmp_path / "deit_3_small.pth")
    assert equal(model, state)


@pytest.mark.parametrize("folder", ["", "last"])
def test_reads_our_folders(tmp_path, model, folder):
    state, average = different(model), different(model)
    (tmp_path / folder).mkdir(exist_ok=True)
    save_file(state, tmp_path / folder / "model.safetensors")
    save_file(average, tmp_path / folder / "ema.safetensors")
    load_weights(model, tmp_path)
    assert equal(model, state)
    load_weights(model, tmp_path, ema=True)
    assert equal(model, average)


def test_fills_models_of_timm(tmp_path):
    """Teachers are timm's: convolutional, with BatchNorm's buffers and a head of another name."""
    source, target = (timm.create_model("resnet10t", num_classes=4) for _ in range(2))
    save_file(source.state_dict(), tmp_path / "teacher.safetensors")
    load_weights(target, tmp_path / "teacher.safetensors")
    assert equal(target, source.state_dict())
    other = timm.create_model("resnet10t", num_classes=7)
    with pytest.raises(ValueError, match="has 4 classes, the model 7"):
        load_weights(other, tmp_path / "teacher.safetensors")


# Position embedding


def facebook_interpolation(pos_embed, new_size, num_extra_tokens):
    """Written out from the description of the fine-tuning step of facebookresearch/deit main.py."""
    orig_size = int((pos_embed.shape[-2] - num_extra_tokens) ** 0.5)
    extra, patches = pos_embed[:, :num_extra_tokens], pos_embed[:, num_extra_tokens:]
    patches = patches.reshape(-1, orig_size, orig_size, pos_embed.shape[-1]).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(new_size, new_size), mode="bicubic", align_corners=False)
    return torch.cat((extra, patches.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


@pytest.mark.parametrize("prefix_tokens", [0, 1, 2])
@pytest.mark.parametrize("old, new", [(14, 24), (14, 7), (4, 5)])
def test_interpolation_is_facebooks(old, new, prefix_tokens):
    pos_embed = torch.randn(1, old * old + prefix_tokens, 24)
    ours = interpolate_position_embedding(pos_embed, (new, new), prefix_tokens=prefix_tokens)
    torch.testing.assert_close(ours, facebook_interpolation(pos_embed, new, prefix_tokens), rtol=0, atol=0)
    assert torch.equal(ours[:, :prefix_tokens], pos_embed[:, :prefix_tokens])


def test_interpolation_is_not_timms():
    """Documented: timm antialiases. Without that, its function gives ours."""
    pos_embed = torch.randn(1, 14 * 14 + 2, 24)
    ours = interpolate_position_embedding(pos_embed, (24, 24), prefix_tokens=2)
    timms = [resample_abs_pos_embed(pos_embed, [24, 24], num_prefix_tokens=2, antialias=a) for a in (False, True)]
    torch.testing.assert_close(ours, timms[0])
    assert 1e-3 < (ours - timms[1]).abs().max() < 1


def test_interpolation_of_rectangles():
    """A ramp along the columns stays one, whatever the number of rows becomes."""
    ramp = torch.arange(6.0).repeat(4, 1).reshape(1, 24, 1)
    pos_embed = torch.cat([torch.full((1, 2, 1), 99.0), ramp], dim=1)
    ours = interpolate_position_embedding(pos_embed, (8, 6), prefix_tokens=2, old_grid=(4, 6))
    torch.testing.assert_close(ours[0, 2:, 0], torch.arange(6.0).repeat(8))
    with pytest.raises(ValueError, match="24 positions of patches do not form a grid of 4 x 4; give the rows"):
        interpolate_position_embedding(pos_embed, (8, 8), prefix_tokens=2)


def test_half_precision_positions_keep_their_type():
    pos_embed = torch.randn(1, 18, 8).half()
    ours = interpolate_position_embedding(pos_embed, (6, 6), prefix_tokens=2)
    exact = interpolate_position_embedding(pos_embed.double(), (6, 6), prefix_tokens=2)
    assert ours.dtype == torch.float16
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [NANO, PLAIN])
def test_loads_into_another_resolution(tmp_path, name):
    small = create_model(name, num_classes=5)
    torch.save(small.state_dict(), tmp_path / "small.pth")
    large = create_model(name, num_classes=5, img_size=(32, 24))
    notes = load_weights(large, tmp_path / "small.pth")
    prefix = small.num_prefix_tokens
    expected = interpolate_position_embedding(small.pos_embed, (8, 6), prefix_tokens=prefix)
    assert torch.equal(large.pos_embed, expected)
    assert torch.equal(large.blocks[5].mlp.fc2.weight, small.blocks[5].mlp.fc2.weight)
    assert notes == ["position embedding interpolated from 16 patches to 8 x 6 (bicubic)"]
    # and back, where the grid has to be told
    with pytest.raises(ValueError, match=r"the position embedding of .* does not fit: 48 positions"):
        torch.save(large.state_dict(), tmp_path / "large.pth")
        load_weights(small, tmp_path / "large.pth")
    load_weights(small, tmp_path / "large.pth", old_grid=(8, 6))


def test_deit3_positions_have_no_prefix(tmp_path):
    small = small_deit3()
    torch.save(small.state_dict(), tmp_path / "small.pth")
    large = create_model("deit3_small_patch16_224", num_classes=5, img_size=64)
    load_weights(large, tmp_path / "small.pth")
    assert torch.equal(large.pos_embed, interpolate_position_embedding(small.pos_embed, (4, 4), prefix_tokens=0))


def test_timm_vits_are_interpolated_too(tmp_path):
    options = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    small = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, **options)
    large = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, **options)
    torch.save(small.state_dict(), tmp_path / "small.pth")
    load_weights(large, tmp_path / "small.pth")
    assert torch.equal(large.pos_embed, interpolate_position_embedding(small.pos_embed, (4, 4), prefix_tokens=2))


# Heads


def test_another_number_of_classes_is_refused_or_fresh(tmp_path, model):
    theirs = create_model(NANO, num_classes=3)
    torch.save(theirs.state_dict(), tmp_path / "three.pth")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"has 3 classes, the model 5: .*new_head=True"):
        load_weights(model, tmp_path / "three.pth")
    assert equal(model, before)
    notes = load_weights(model, tmp_path / "three.pth", new_head=True)
    assert [note.split(":")[0] for note in notes] == [
        "head starts fresh for 5 classes",
        "head_dist starts fresh for 5 classes",
    ]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith("head") else theirs.state_dict()[name]), name


def test_the_head_is_kept_where_the_classes_agree(tmp_path, model):
    state = different(model)
    torch.save(state, tmp_path / "five.pth")
    assert load_weights(model, tmp_path / "five.pth", new_head=True) == []
    assert equal(model, state)


def test_a_file_without_heads(tmp_path, model):
    state = {name: tensor for name, tensor in different(model).items() if not name.startswith("head")}
    torch.save(state, tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match=r"lacks head.weight, head.bias, head_dist.weight and 1 more"):
        load_weights(model, tmp_path / "backbone.pth")
    notes = load_weights(model, tmp_path / "backbone.pth", new_head=True)
    assert len(notes) == 2 and notes[0].endswith("has no head")


# What does not fit is refused, and leaves the model as it was


def refusal(tmp_path, model, state, **options):
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as refused:
        load_weights(model, path, **options)
    assert equal(model, before)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("new_head", [False, True])
def test_plain_and_distilled_do_not_mix(tmp_path, new_head):
    plain, distilled = create_model(PLAIN, num_classes=5), create_model(NANO, num_classes=5)
    message = refusal(tmp_path, distilled, plain.state_dict(), new_head=new_head)
    assert "has no distillation token, the model has one: choose the model's plain variant" in message
    message = refusal(tmp_path, plain, distilled.state_dict(), new_head=new_head)
    assert "has a distillation token, the model has none: choose the model's distilled variant" in message


def test_another_width_depth_or_patch(tmp_path, model):
    tiny = create_model("deit_tiny_distilled_patch16_224", num_classes=5)
    assert "192 channels wide, this one has 128" in refusal(tmp_path, model, tiny.state_dict())
    patches = create_model(NANO, num_classes=5, patch_size=8)
    assert "patches of 8 pixels, the model of 4: make the model with 8" in refusal(
        tmp_path, model, patches.state_dict()
    )
    shallow = {name: tensor for name, tensor in different(model).items() if "blocks.5" not in name}
    message = refusal(tmp_path, model, shallow)
    assert "lacks blocks.5.norm1.weight, blocks.5.norm1.bias, blocks.5.attn.qkv.weight and 9 more" in message
    more = {**different(model), "extra.weight": torch.zeros(1)}
    assert "has extra.weight, which the model has not" in refusal(tmp_path, model, more)
    bent = {**different(model), "norm.weight": torch.zeros(3)}
    assert "norm.weight is 3 in the file, 128 in the model" in refusal(tmp_path, model, bent)


def test_missing_files(tmp_path, model):
    with pytest.raises(ValueError, match=r"no checkpoint at .*nowhere.pth: give a folder"):
        load_weights(model, tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match=r"holds no checkpoint: there is no model.safetensors in it or in last/"):
        load_weights(model, tmp_path)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"these are not weights", b"PK\x03\x04 cut off"])
def test_broken_files(tmp_path, model, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not a"):
        load_weights(model, tmp_path / name)


def test_a_truncated_file(tmp_path, model):
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_weights(model, path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused(tmp_path, model, legacy):
    class Crafted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    path = tmp_path / "crafted.pth"
    if legacy:
        path.write_bytes(pickle.dumps({"model": Crafted()}, protocol=2))
    else:
        torch.save({"model": {"head.weight": Crafted()}}, path)
    with pytest.raises(ValueError, match=r"crafted.pth is refused: restoring the (posix|os|nt)\.mkdir in it"):
        load_weights(model, path)
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize("saved, found", [({"epoch": 3}, "'epoch'"), ([1, 2], "a list"), ({}, "nothing")])
def test_files_without_weights(tmp_path, model, saved, found):
    torch.save(saved, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"holds no state dict: expected 'model' or 'state_dict' in it, found {found}"):
        load_weights(model, tmp_path / "other.pth")


def test_a_file_without_a_moving_average(tmp_path, model):
    torch.save({"model": model.state_dict()}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="holds no moving average"):
        read_state_dict(tmp_path / "checkpoint.pth", ema=True)
