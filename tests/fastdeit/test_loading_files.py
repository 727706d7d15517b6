"""Files of weights and what they say of their model: sizes, prefixes, classes. What was typed outranks what a file
knows, and that outranks a default."""

import argparse

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastdeit.cli import typed_flags
from fastdeit.config import Distillation
from fastdeit.distill.teacher import load as load_teacher
from fastdeit.errors import UserError
from fastdeit.export.formats import export
from fastdeit.models import sources, weights
from fastdeit.models.build import build_student, create_model
from fastdeit.models.deit import create_model as create_ours
from fastdeit.models.loading import has_moving_average, load_model

from .written import CLASSES, HERE, NANO, PLAIN, answers, lively, loaded_from, parse_flags, same, settings, write_run

# ---------------------------------------------------------------------------------------------------------------------
# Files: what their tensors and their own records say


def test_a_training_checkpoint_says_its_model_and_its_size(tmp_path):
    model = lively(create_ours(NANO, num_classes=3, img_size=32))
    arguments = argparse.Namespace(model=NANO, input_size=32, nb_classes=3)
    torch.save({"model": model.state_dict(), "args": arguments}, tmp_path / "deit.pth")
    loaded = load_model(tmp_path / "deit.pth")
    assert (loaded.architecture, loaded.input_size, loaded.notes) == (NANO, 32, ())
    same(loaded.model, model, 32)
    resnet = lively(timm.create_model("test_resnet", num_classes=3))
    torch.save({"arch": "test_resnet", "state_dict": resnet.state_dict()}, tmp_path / "timm.pth")
    taught = load_teacher(Distillation(teacher_path=str(tmp_path / "timm.pth")), HERE)  # not the default's regnety_160
    same(taught.model, resnet, 64)


@pytest.mark.parametrize("patch, size", [(4, 32), (8, 32), (2, 16)])
def test_size_and_patch_are_read_off_the_tensors(tmp_path, patch, size):
    """A file of positions for 32 pixels is not used at the 16 of its model's name."""
    model = lively(create_ours(PLAIN, num_classes=5, img_size=size, patch_size=patch))
    save_file(model.state_dict(), tmp_path / "file.safetensors")
    loaded = load_model(tmp_path / "file.safetensors", name=PLAIN)
    assert (loaded.input_size, loaded.num_classes, loaded.notes) == (size, 5, ())
    same(loaded.model, model, size)
    other = load_model(tmp_path / "file.safetensors", name=PLAIN, input_size=48)
    assert other.input_size == 48 and other.notes[-1].startswith("position embedding interpolated from")


@pytest.mark.parametrize("prefix", ["model.", "model._orig_mod.", "module.", "net.backbone.", "_orig_mod.module."])
@pytest.mark.parametrize("name", [NANO, "test_resnet"])
def test_one_shared_prefix_is_left_out_and_told(tmp_path, prefix, name):
    model = create_model(name, num_classes=3)
    state = {key: torch.randn(value.shape).to(value.dtype) for key, value in model.state_dict().items()}
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "file.ckpt")
    notes = weights.load_weights(model, tmp_path / "file.ckpt")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    told = "module" not in prefix.split(".")[0] and prefix.split(".")[0] != "_orig_mod"
    assert notes == ([f"the names in {tmp_path / 'file.ckpt'} are read without their prefix {prefix}"] if told else [])


@pytest.mark.parametrize(
    "path", ["teacher", "model_state_dict", "net", "state_dict/model", "model/state_dict", "state_dict", "model"]
)
def test_where_projects_keep_the_state_dict(tmp_path, path):
    model = create_ours(NANO, num_classes=3)
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    saved = dict(state)
    for name in reversed(path.split("/")):
        saved = {name: saved, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}}
    torch.save(saved, tmp_path / "file.pth")
    notes = weights.load_weights(model, tmp_path / "file.pth")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert len(notes) == (path in ("teacher", "model_state_dict", "net"))
    assert all(f"the weights are '{path}'" in note for note in notes)


def test_a_teacher_beside_its_student(tmp_path):
    """DINO's files: the teacher is what is published."""
    model = create_ours(NANO, num_classes=3)
    teacher, student = ({k: torch.randn_like(v) for k, v in model.state_dict().items()} for _ in range(2))
    torch.save({"student": student, "teacher": {f"module.{k}": v for k, v in teacher.items()}}, tmp_path / "dino.pth")
    (note,) = weights.load_weights(model, tmp_path / "dino.pth")
    assert "'teacher'" in note and "not 'student'" in note
    assert torch.equal(model.norm.weight, teacher["norm.weight"])


def test_a_lightning_module_with_more_than_the_model(tmp_path):
    model = create_ours(NANO, num_classes=3)
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    wrapped = {f"model.{key}": value for key, value in state.items()} | {"criterion.weight": torch.ones(3)}
    torch.save({"state_dict": wrapped}, tmp_path / "one.ckpt")
    (note,) = weights.load_weights(model, tmp_path / "one.ckpt")
    assert note.endswith("without their prefix model.; 1 others are left out, such as criterion.weight")
    assert torch.equal(model.head.weight, state["head.weight"])
    twice = wrapped | {f"teacher.{key}": value for key, value in state.items()}
    torch.save({"state_dict": twice}, tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match=r"more than once \(model\., teacher\.\): save the state dict of one"):
        weights.load_weights(model, tmp_path / "two.ckpt")


def test_a_moving_average_is_looked_for_where_one_is(tmp_path):
    model = create_ours(NANO, num_classes=3)
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": model.state_dict()}, tmp_path / "b.pth")
    write_run(tmp_path / "run")
    found = [has_moving_average(tmp_path / name) for name in ("a.pth", "b.pth", "run", "nowhere")]
    assert found == [False, True, False, False]
    with pytest.raises(ValueError, match="holds no moving average"):
        load_model(tmp_path / "run", weights="ema")


# ---------------------------------------------------------------------------------------------------------------------
# Equal shapes are not equal meaning


def test_positions_of_a_square_in_a_rectangle_of_as_many(tmp_path):
    square, wide = (create_ours(PLAIN, num_classes=3, img_size=size) for size in ((32, 32), (16, 64)))
    assert square.pos_embed.shape == wide.pos_embed.shape
    save_file(square.state_dict(), tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=r"grid of 8 x 8 or the model's 4 x 16: say which as old_grid"):
        weights.load_weights(wide, tmp_path / "file.safetensors")
    expected = weights.interpolate_position_embedding(square.pos_embed, (4, 16), prefix_tokens=1, old_grid=(8, 8))
    notes = weights.load_weights(wide, tmp_path / "file.safetensors", old_grid=(8, 8))
    assert torch.equal(wide.pos_embed, expected) and notes == [
        "position embedding interpolated from 64 patches to 4 x 16 (bicubic)"
    ]
    weights.load_weights(wide, tmp_path / "file.safetensors", old_grid=(4, 16))
    assert torch.equal(wide.pos_embed, square.pos_embed)


def test_a_folder_says_its_grid(tmp_path):
    run = write_run(tmp_path / "run", PLAIN, 32)
    wide = create_ours(PLAIN, num_classes=3, img_size=(16, 64))
    weights.load_weights(wide, tmp_path / "run")
    expected = weights.interpolate_position_embedding(run.pos_embed, (4, 16), prefix_tokens=1, old_grid=(8, 8))
    assert torch.equal(wide.pos_embed, expected)
    export(loaded_from(wide, PLAIN), "timm", tmp_path / "wide")
    again = load_model(tmp_path / "wide")
    assert again.input_size == (16, 64) and torch.equal(again.model.pos_embed, wide.pos_embed)
    squared = load_model(tmp_path / "wide", input_size=32)
    expected = weights.interpolate_position_embedding(wide.pos_embed, (8, 8), prefix_tokens=1, old_grid=(4, 16))
    assert torch.equal(squared.model.pos_embed, expected) and "interpolated from 64 patches" in squared.notes[0]


def test_a_head_is_kept_for_the_same_classes_only(tmp_path):
    model = write_run(tmp_path / "run")
    config = settings(finetune=str(tmp_path / "run"))
    student, notes = build_student(config, 3, CLASSES)
    assert torch.equal(student.head.weight, model.head.weight) and len(notes) == 1

    student, notes = build_student(config, 3, ("cow", "ant", "bee"))
    assert torch.equal(student.head.weight, model.head.weight[[2, 0, 1]])
    assert torch.equal(student.head_dist.bias, model.head_dist.bias[[2, 0, 1]])
    assert torch.equal(student.norm.weight, model.norm.weight)
    assert notes[1:] == [f"the rows of {head} are put into the order of the data's classes" for head in HEADS]

    student, notes = build_student(config, 3, ("cat", "dog", "cow"))
    assert not (student.head.weight == model.head.weight).any()
    assert not (student.head_dist.weight == model.head_dist.weight).any()
    assert all(note.endswith("has the classes ant, bee, cow, not cat, dog, cow") for note in notes[1:])
    assert len(notes) == 3 and torch.equal(student.norm.weight, model.norm.weight)

    file = tmp_path / "file.safetensors"
    save_file(model.state_dict(), file)
    student, notes = build_student(settings(finetune=str(file)), 3, ("cat", "dog", "cow"))
    assert torch.equal(student.head.weight, model.head.weight)
    assert notes[1:] == [
        f"{file} does not name its 3 classes: they are taken for the data's, cat, dog, cow, in this order"
    ]
    _, notes = build_student(settings(finetune=str(file)), 3, ("1", "10", "2"))
    assert len(notes) == 3 and notes[2].startswith("the classes are sorted as strings (1, 10, 2, ...)")


HEADS = ("head", "head_dist")


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint knows outranks a default; a typed flag outranks the checkpoint


def test_typed_flags():
    arguments = "--model_ema --no-aa=none --lr 1e-3 -v --input-size=32 photo--a.jpg".split()
    assert typed_flags(arguments) == {"--model-ema", "--aa", "--lr", "--input-size"}


def test_a_start_from_a_run_takes_over_what_it_knows(tmp_path):
    write_run(tmp_path / "run", PLAIN, 32, patch_size=8, crop=0.7)
    config = parse_flags("--finetune", tmp_path / "run")
    taken = (config.model.model, config.model.patch_size, config.data.input_size, config.data.eval_crop_ratio)
    assert taken == (PLAIN, 8, 32, 0.7)
    typed = ["--model", NANO, "--patch-size", 4, "--input-size", 16, "--eval-crop-ratio", 1]
    config = parse_flags("--finetune", tmp_path / "run", *typed)
    taken = (config.model.model, config.model.patch_size, config.data.input_size, config.data.eval_crop_ratio)
    assert taken == (NANO, 4, 16, 1.0)


@pytest.mark.parametrize("recipe", ["deit_base_384", "deit_base_distilled_384", "deit3_finetune"])
def test_a_recipe_about_a_size_keeps_it(tmp_path, recipe):
    write_run(tmp_path / "run", PLAIN, 32)
    config = parse_flags("--recipe", recipe, "--finetune", tmp_path / "run")
    own = parse_flags("--recipe", recipe, "--finetune", tmp_path / "nowhere")
    assert config.model.model == PLAIN
    assert (config.data.input_size, config.data.eval_crop_ratio) == (own.data.input_size, own.data.eval_crop_ratio)
    assert parse_flags("--recipe", recipe, "--finetune", tmp_path / "run", "--eval").data.input_size == 32


# ---------------------------------------------------------------------------------------------------------------------
# Sizes: a model looks at all of an image, or is refused in words


@pytest.mark.parametrize(
    "name, size, words",
    [
        ("test_vit", 40, "40 pixels do not divide into patches of 16, the rest would be lost; choose --input-size 32"),
        ("mixer_s32_224", 100, "do not divide into patches of 32"),  # its patches are cut by a module of another name
        ("convnext_atto", 66, "choose --input-size 64 or 68"),
        ("nest_tiny", 100, "timm's cannot take images of 100 pixels (AssertionError: First level"),
        ("levit_128s", 100, "timm's cannot take images of 100 pixels (RuntimeError"),  # only in its forward pass
        (PLAIN, 15, "15 x 15 pixels do not divide into patches of 4"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit(name, size, words):
    with pytest.raises((UserError, ValueError)) as refused:
        build_student(settings(name, size), 3)
    assert words in str(refused.value)


@pytest.mark.parametrize("name, size", [("test_vit", 48), ("test_resnet", 33), ("convnext_atto", 68), (PLAIN, 20)])
def test_sizes_that_fit_leave_the_model_as_it_was(name, size):
    model, _ = build_student(settings(name, size), 3)
    assert model.training and answers(model, size).shape == (2, 3)
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_meta for tensor in tensors) and not any(m._forward_pre_hooks for m in model.modules())


def test_a_teacher_of_a_size_that_does_not_fit_is_told_by_its_own_flag(tmp_path):
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "vit.safetensors")
    asked = Distillation(
        teacher_model="test_vit", teacher_path=str(tmp_path / "vit.safetensors"), teacher_input_size=40
    )
    with pytest.raises(UserError, match=r"--teacher-model test_vit: .*choose --teacher-input-size 32 or 48"):
        load_teacher(asked, HERE)


def test_timm_converts_what_only_it_knows():
    """Tables of relative positions at another size, which are no positions of patches."""
    name = "swin_tiny_patch4_window7_224"
    theirs, model = (create_model(name, num_classes=3, input_size=size) for size in (224, 192))
    source = sources.Source("it", "file", "it", {})
    state, notes = weights.fit(model, theirs.state_dict(), source)
    assert notes == ["names and shapes converted as timm does for this model"]
    before, wanted = theirs.state_dict(), model.state_dict()
    resized = {key for key, tensor in state.items() if tensor.shape != before[key].shape}
    assert resized and all(key.endswith("relative_position_bias_table") for key in resized)
    assert all(tensor.shape == wanted[key].shape for key, tensor in state.items())
    same_name = "layers.0.blocks.0.mlp.fc1.weight"
    assert torch.equal(state[same_name], theirs.state_dict()[same_name])
    theirs, model = (create_model("pit_ti_224", num_classes=3, input_size=size) for size in (64, 96))
    with pytest.raises(ValueError, match=r"pos_embed is .*, at the size of images it was trained for"):
        weights.fit(model, theirs.state_dict(), source)
