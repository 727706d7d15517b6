"""Which teachers are taken, with which weights and classes, and which are refused."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastdeit.cli import parse_config
from fastdeit.config import Distillation
from fastdeit.distill import teacher as teacher_loading
from fastdeit.distill.class_map import SelectClasses, read_groups, same_classes
from fastdeit.distributed.world import join
from fastdeit.errors import UserError

from .conftest import SMALL

pytest.importorskip("timm", minversion="1.0.31")  # older ones cannot read a local folder's safetensors

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3).eval()


def load(settings):
    return teacher_loading.load(settings, torch.device("cpu"))


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_a_checkpoint_file_keeps_its_head(resnet, tmp_path):
    save_file(resnet.state_dict(), tmp_path / "teacher.safetensors")
    loaded = load(Distillation(teacher_model="test_resnet", teacher_path=str(tmp_path / "teacher.safetensors")))
    assert loaded.num_classes == 3 and loaded.input_size == 160 and loaded.mean == (0.5, 0.5, 0.5)
    assert torch.equal(loaded.model.eval()(images()), resnet(images()))


def test_a_folder_timm_can_load(resnet, tmp_path):
    save_file(resnet.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "test_resnet", "num_classes": 3, "label_names": list(CLASSES),
        "pretrained_cfg": {
            "input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "classifier": "fc",
            "first_conv": "conv1.0",
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load(Distillation(teacher_model=f"local-dir:{tmp_path}"))
    assert (loaded.classes, loaded.input_size) == (CLASSES, 32)
    assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert torch.equal(loaded.model.eval()(images()), resnet(images()))
    assert teacher_loading.class_groups(loaded, None, CLASSES) is None
    with pytest.raises(UserError, match="--teacher-classes"):
        teacher_loading.class_groups(loaded, None, ("blue", "red", "green"))
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        load(Distillation(teacher_model=f"local-dir:{tmp_path}"))


def test_our_own_run_at_another_size(colors, tmp_path):
    from fastdeit.train import train

    folder = tmp_path / "run"
    arguments = [*SMALL, "--epochs", "1", "--model", "deit_nano_patch4_16", "--data-path", str(colors)]
    with join("cpu") as world:
        train(parse_config([*arguments, "--output-dir", str(folder)]), world)
    loaded = load(Distillation(teacher_path=str(folder), teacher_input_size=32))
    assert (loaded.classes, loaded.input_size, loaded.model.grid_size) == (CLASSES, 32, (8, 8))
    assert loaded.model.drop_path == 0
    description = folder / "last" / "config.json"
    saved = json.loads(description.read_text())
    saved["settings"]["speed"]["attention"] = "xformers"  # trained on a GPU; it runs here all the same
    description.write_text(json.dumps(saved))
    assert load(Distillation(teacher_path=str(folder))).model.eval()(images(16)).isfinite().all()


def test_a_transformer_of_timm_at_another_size(tmp_path):
    torch.manual_seed(0)
    saved = timm.create_model("test_vit", num_classes=3)
    save_file(saved.state_dict(), tmp_path / "vit.safetensors")
    settings = Distillation(
        teacher_model="test_vit", teacher_path=str(tmp_path / "vit.safetensors"), teacher_input_size=192
    )
    loaded = load(settings)
    assert loaded.input_size == 192 and loaded.model(images(192)).shape == (2, 3)
    assert torch.equal(loaded.model.head.weight, saved.head.weight)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher_model": "resnet_5000"}, "did you mean resnet"),
        ({"teacher_model": "local-dir:/nowhere"}, "no checkpoint local-dir:/nowhere"),
        ({"teacher_model": "some/where"}, "hf-hub:ORG/NAME"),
        ({"teacher_model": "test_resnet", "teacher_path": "/nowhere.pth"}, "no such file"),
    ],
)
def test_teachers_that_are_none(settings, words):
    with pytest.raises(UserError, match=words):
        load(Distillation(**settings))


# ---------------------------------------------------------------------------------------------------------------------
# Classes


def test_equal_by_count_where_no_names_are_known():
    same_classes("resnet50", None, 3, CLASSES)
    with pytest.raises(UserError, match=r"1000 classes.*3 classes \(blue, green, red\).*teach fit"):
        same_classes("resnet50", None, 1000, CLASSES)


@pytest.mark.parametrize("names", [("blue", "green"), ("red", "green", "blue"), ("blue", "green", "crimson")])
def test_equal_by_name_where_they_are_known(names):
    with pytest.raises(UserError, match="--teacher-classes"):
        same_classes("runs/1", names, len(names), CLASSES)


def groups(tmp_path, content, *, name="classes.txt", classes=("tench", "dog"), names=None, count=1000):
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_groups(file, classes, names, count)


def test_an_imagenet_teacher_by_synset_word_or_index(tmp_path):
    assert groups(tmp_path, "n01440764\nn02099601\n") == [[0], [207]]
    assert groups(tmp_path, "tench\ngolden retriever\n") == [[0], [207]]
    assert groups(tmp_path, "0\n207") == [[0], [207]]
    assert groups(tmp_path, {"dog": [207, "n02099712"], "tench": 0}, name="a.json") == [[0], [207, 208]]
    assert groups(tmp_path, [0, [207, 208]], name="b.json") == [[0], [207, 208]]


def test_own_names_come_before_indices(tmp_path):
    assert groups(tmp_path, "2\n0", names=("0", "2", "5"), count=3) == [[1], [0]]
    assert groups(tmp_path, [2, 0], name="a.json", names=("0", "2", "5"), count=3) == [[2], [0]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("n01440764", "1 entries"),
        ("n01440764\ncrane", "'crane'"),  # two of ImageNet's classes are cranes
        ("n01440764\n1000", "0 to 999"),
        ("n01440764\nn01440764", "both tench and dog"),
        ({"tench": 0}, "lacks.*dog"),
        ({"tench": 0, "dog": 207, "cat": 281}, "cat"),
        ({"tench": 0, "dog": []}, "no class of the teacher"),
        ("{", "not valid JSON"),
        ("3", "1 entries"),
    ],
)
def test_mappings_that_cannot_be_meant(tmp_path, content, words):
    with pytest.raises(UserError, match=words):
        groups(tmp_path, content)


def test_a_mapping_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"absent\.txt"):
        read_groups(tmp_path / "absent.txt", CLASSES, None, 1000)


def test_several_classes_of_the_teacher_add_up_their_probabilities():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    one_to_one = SelectClasses([[4], [0], [8]], 9)(logits)
    assert torch.equal(one_to_one, logits[:, [4, 0, 8]])
    selected = SelectClasses([[4], [0, 8, 2]], 9)(logits)
    probabilities = logits.softmax(1)
    expected = torch.stack([probabilities[:, 4], probabilities[:, [0, 8, 2]].sum(1)], 1)
    torch.testing.assert_close(selected.softmax(1), expected / expected.sum(1, keepdim=True))
    half = SelectClasses([[4], [0, 8, 2]], 9)(logits.half())
    torch.testing.assert_close(half, selected, atol=5e-3, rtol=5e-3)
