"""What was trained can be used: a checkpoint of any model, and folders and files of other projects, are read back as
what they are, and a load says what it did."""

import argparse
import json
import shutil
from unittest import mock

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastdeit.checkpoint import files
from fastdeit.cli import parse_config, typed_flags
from fastdeit.config import Config, Distillation
from fastdeit.distill.teacher import load as load_teacher
from fastdeit.errors import UserError
from fastdeit.export.formats import export
from fastdeit.models import sources, weights
from fastdeit.models.build import build_student, create_model
from fastdeit.models.deit import create_model as create_ours
from fastdeit.models.loading import LoadedModel, has_moving_average, load_model

NANO, PLAIN = "deit_nano_distilled_patch4_16", "deit_nano_patch4_16"
CLASSES, MEAN, STD = ("ant", "bee", "cow"), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
HERE = torch.device("cpu")


def settings(model=NANO, size=16, **fields) -> Config:
    config = Config()
    config.model.model, config.data.input_size, config.model.drop_path = model, size, 0.0
    for name, value in fields.items():
        setattr(config.model, name, value)
    return config


def lively(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model.eval()


def write_run(folder, model=NANO, size=16, classes=CLASSES, crop=0.8, **fields):
    """A run's folder as the trainer leaves it; returns its model in eval mode."""
    config = settings(model, size, **fields)
    config.data.eval_crop_ratio = crop
    made = lively(build_student(config, len(classes))[0])
    described = files.describe(made, config, classes, MEAN, STD)
    files.save(folder, described, step=1, model=made.state_dict(), ema=None, training={})
    return made


def loaded_from(model, name) -> LoadedModel:
    """`model` as load_model would return it."""
    return LoadedModel(
        name=name, architecture=name, model=model, classes=CLASSES, input_size=16, mean=MEAN, std=STD, crop_pct=0.8,
    )  # fmt: skip


def answers(model, size):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(images)


def same(model, other, size, **tolerance):
    torch.testing.assert_close(answers(model, size), answers(other, size), **(tolerance or {"rtol": 0, "atol": 0}))


# ---------------------------------------------------------------------------------------------------------------------
# Every model that can be trained is read back


def without_data(name):
    """A model with shapes only, quickly: nothing is drawn."""
    nothing = {f: lambda tensor, *_, **__: tensor for f in ("trunc_normal_", "normal_", "uniform_", "zeros_", "ones_")}
    with torch.device("meta"), mock.patch.multiple(torch.nn.init, **nothing):
        return timm.create_model(name)


def read_back(name):
    """The weights of a model fit into another of its kind as they are, by the very names, and nothing is reported."""
    model = without_data(name)
    state = model.state_dict()
    source = sources.Source("it", "ours", "it", {})
    fitted, notes = weights.fit(model, dict(state), source)
    assert notes == [] and fitted.keys() == state.keys(), name
    assert all(fitted[key] is state[key] for key in state), name


@pytest.mark.parametrize(
    "name",
    [  # owners of a gamma_1, or of a class token without patch_embed.proj.weight, and one that is unlike ViTs
        "beit_base_patch16_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "pit_ti_distilled_224", "test_resnet",
    ],
)  # fmt: skip
def test_weights_fit_where_they_came_from(name):
    read_back(name)


@pytest.mark.soak
def test_all_of_timms_models_are_read_back():
    names = timm.list_models(exclude_filters="fastdeit_*")
    assert len(names) > 1000
    for name in names:
        read_back(name)


FAMILIES = {  # with a size they all take, small where they allow it
    "test_vit": 64, "test_resnet": 64, "pit_ti_distilled_224": 64, "fastdeit_deit_nano_patch4_16": 16,
}  # fmt: skip
LARGER = {
    "xcit_nano_12_p16_224": 64, "cait_xxs24_224": 32, "eva02_tiny_patch14_224": 56, "test_convnext": 64,
    "levit_128s": 224, "mobilevit_xxs": 64, "coat_lite_tiny": 64, "efficientvim_m1_dist": 64,
    "deit_tiny_distilled_patch16_224": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    "name, size", [*FAMILIES.items(), *(pytest.param(*one, marks=pytest.mark.soak) for one in LARGER.items())]
)
def test_a_run_of_any_model_can_be_used(tmp_path, name, size):
    """By predict and evaluate (load_model), as a teacher, as a start of training, and as an export, which answers as
    the run does and is itself read back."""
    model = write_run(tmp_path / "run", name, size)
    loaded = load_model(tmp_path / "run")
    assert (loaded.kind, loaded.classes, loaded.input_size, loaded.crop_pct) == ("ours", CLASSES, size, 0.8)
    assert (loaded.mean, loaded.std, loaded.notes) == (MEAN, STD, ())
    same(loaded.model, model, size)
    taught = load_teacher(Distillation(teacher_path=str(tmp_path / "run")), HERE)
    assert (taught.input_size, taught.classes, taught.mean) == (size, CLASSES, MEAN)
    same(taught.model, model, size)
    student, notes = build_student(settings(name, size, finetune=str(tmp_path / "run")), 3, CLASSES)
    assert notes == [f"starts from {tmp_path / 'run/last/model.safetensors'}"]
    same(student, model, size)
    export(loaded, "timm", tmp_path / "exported")
    back = load_model(tmp_path / "exported")
    assert (back.kind, back.classes, back.input_size, back.crop_pct) == ("timm", CLASSES, size, 0.8)
    assert (back.mean, back.std, back.notes) == (MEAN, STD, ())
    same(back.model, model, size, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Folders of other projects


def test_a_folder_of_timm_is_started_from_and_adopted(tmp_path):
    model = write_run(tmp_path / "run")
    export(loaded_from(model, NANO), "timm", tmp_path / "timm")
    config = parse_flags("--finetune", tmp_path / "timm")
    assert (config.model.model, config.data.input_size, config.data.eval_crop_ratio) == (NANO, 16, 0.8)
    student, _ = build_student(config, 3, CLASSES)
    same(student, model, 16)
    assert student.normalisation == (MEAN, STD)
    taught = load_teacher(Distillation(teacher_path=str(tmp_path / "timm")), HERE)
    assert taught.classes == CLASSES and taught.mean == MEAN


def test_a_snapshot_in_the_hubs_cache(tmp_path):
    model = write_run(tmp_path / "run")
    cached = tmp_path / "models--me--nano"
    export(loaded_from(model, NANO), "timm", cached / "snapshots" / "abc")
    for folder in (cached, cached / "snapshots" / "abc"):
        same(load_model(folder).model, model, 16)
    shutil.copytree(cached / "snapshots" / "abc", cached / "snapshots" / "def")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("def")
    assert sources.find(cached).weights.parent.name == "def"


def transformers_model(kind, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config, network = {
        "vit": (transformers.ViTConfig, transformers.ViTForImageClassification),
        "deit": (transformers.DeiTConfig, transformers.DeiTForImageClassificationWithTeacher),
        "one head": (transformers.DeiTConfig, transformers.DeiTForImageClassification),
    }[kind]
    names = dict(enumerate(CLASSES))
    return lively(network(config(**sizes, image_size=16, patch_size=4, id2label=names, **options)))


def logits(network):
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network(images).logits


@pytest.mark.parametrize("kind", ["vit", "deit", "one head"])
@pytest.mark.parametrize("eps", [1e-12, 1e-3])
def test_a_folder_of_transformers_answers_as_there(tmp_path, kind, eps):
    """In our code where it is the same network, with its own epsilon of LayerNorm; else in that of transformers."""
    network = transformers_model(kind, layer_norm_eps=eps)
    network.save_pretrained(tmp_path)
    processor = {
        "image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": 20}, "do_center_crop": True,
        "crop_size": {"height": 16, "width": 16},
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    loaded = load_model(tmp_path)
    assert (loaded.kind, loaded.classes, loaded.input_size, loaded.crop_pct) == ("transformers", CLASSES, 16, 0.8)
    assert (loaded.mean, loaded.std, loaded.notes) == (MEAN, STD, ())
    torch.testing.assert_close(answers(loaded.model, 16), logits(network), rtol=1e-5, atol=1e-6)
    taught = load_teacher(Distillation(teacher_path=str(tmp_path)), HERE)
    torch.testing.assert_close(answers(taught.model, 16), logits(network), rtol=1e-5, atol=1e-6)
    assert type(loaded.model).__name__ == ("InTransformers" if kind == "one head" else "DeiT")


def test_transformers_without_its_processor_says_what_is_assumed(tmp_path):
    transformers_model("vit").save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.mean == loaded.std == (0.5, 0.5, 0.5) and loaded.crop_pct == 1.0
    assert "no preprocessor_config.json" in loaded.notes[0] and "squeezes" in loaded.notes[1]


def test_a_configuration_of_transformers_without_a_size_has_its_default(tmp_path):
    """224, as in transformers.ViTConfig."""
    transformers = pytest.importorskip("transformers")
    transformers_model("vit").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["image_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(tmp_path)
    assert loaded.input_size == transformers.ViTConfig().image_size == 224
    assert answers(loaded.model, 224).shape == (2, 3)


def test_weights_of_transformers_in_several_files_and_by_its_newer_names(tmp_path):
    network = transformers_model("vit")
    network.save_pretrained(tmp_path)
    state = dict(network.named_parameters())  # the code's names are not those of published files
    first, second = dict(list(state.items())[:9]), dict(list(state.items())[9:])
    (tmp_path / "model.safetensors").unlink()
    for name, part in (("a.safetensors", first), ("b.safetensors", second)):
        save_file({key: value.detach() for key, value in part.items()}, tmp_path / name)
    index = {"weight_map": dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.testing.assert_close(answers(load_model(tmp_path).model, 16), logits(network), rtol=1e-5, atol=1e-6)


def test_our_export_to_transformers_is_read_back_and_started_from(tmp_path):
    pytest.importorskip("transformers")
    model = write_run(tmp_path / "run")
    export(loaded_from(model, NANO), "transformers", tmp_path / "exported")
    loaded = load_model(tmp_path / "exported")
    same(loaded.model, model, 16, rtol=1e-5, atol=1e-5)
    assert (loaded.classes, loaded.mean, loaded.crop_pct, loaded.architecture) == (CLASSES, MEAN, 0.8, NANO)
    config = parse_flags("--finetune", tmp_path / "exported")
    assert config.model.model == NANO and config.data.input_size == 16
    same(build_student(config, 3, CLASSES)[0], model, 16, rtol=1e-5, atol=1e-5)


def test_what_is_none_of_these_is_named(tmp_path):
    def refused(words, source=tmp_path, **options):
        with pytest.raises((UserError, ValueError), match=words):
            load_model(source, **options)

    refused("holds no checkpoint")
    (tmp_path / "settings.json").write_text("{}")
    refused("has no checkpoint yet")
    save_file(create_ours(PLAIN, num_classes=3).state_dict(), tmp_path / "model.safetensors")
    refused("does not say which model it is of: give --model NAME")
    assert load_model(tmp_path, name=PLAIN).num_classes == 3
    (tmp_path / "config.json").write_text('{"name": "mine"}')
    refused("is not of fastdeit, timm or transformers: give the file")
    assert load_model(tmp_path / "model.safetensors", name=PLAIN).num_classes == 3
    (tmp_path / "config.json").write_text('{"model": "deit_nano_patch4_16", "settings": {}}')
    refused("lacks 'input_size'")
    refused("there is no checkpoint", tmp_path / "nowhere")
    refused("add --pretrained", "resnet50")


def test_the_weights_file_of_a_folder_means_the_folder(tmp_path):
    model = write_run(tmp_path / "run")
    loaded = load_model(tmp_path / "run/last/model.safetensors")
    assert loaded.classes == CLASSES
    same(loaded.model, model, 16)


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
    with pytest.raises(UserError, match="16 x 64 pixels, and squares only are made here: give --input-size"):
        load_model(tmp_path / "wide")
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


def parse_flags(*arguments) -> Config:
    pytest.importorskip("tyro")
    return parse_config([str(argument) for argument in ("--recipe", "finetune", "--data-path", "d", *arguments)])


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
