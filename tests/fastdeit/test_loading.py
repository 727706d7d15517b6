"""What was trained can be used: a checkpoint of any model, and folders and files of other projects, are read back as
what they are, and a load says what it did."""

import json
import shutil
from unittest import mock

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastdeit.config import Distillation
from fastdeit.distill.teacher import load as load_teacher
from fastdeit.errors import UserError
from fastdeit.export.formats import export
from fastdeit.models import sources, weights
from fastdeit.models.build import build_student
from fastdeit.models.deit import create_model as create_ours
from fastdeit.models.loading import load_model

from .written import (
    CLASSES,
    HERE,
    MEAN,
    NANO,
    PLAIN,
    STD,
    answers,
    lively,
    loaded_from,
    parse_flags,
    same,
    settings,
    write_run,
)

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
    refused("no checkpoint resnet_50: .* did you mean", "resnet_50")


def test_the_weights_file_of_a_folder_means_the_folder(tmp_path):
    model = write_run(tmp_path / "run")
    loaded = load_model(tmp_path / "run/last/model.safetensors")
    assert loaded.classes == CLASSES
    same(loaded.model, model, 16)
