"""Published weights by name and address, from stand-ins of the hub: its cache, files, and a server on this machine."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fastdeit import evaluate, predict, train
from fastdeit.config import Distillation
from fastdeit.distill.teacher import load as load_teacher
from fastdeit.errors import UserError
from fastdeit.export.__main__ import main as export_command
from fastdeit.export.formats import export
from fastdeit.models import published, sources
from fastdeit.models.architectures import ARCHITECTURES
from fastdeit.models.build import build_student
from fastdeit.models.deit import IMAGENET_MEAN, IMAGENET_STD, DeiT, create_model
from fastdeit.models.loading import has_moving_average, load_model
from fastdeit.training.run import undistilled

from .conftest import SMALL, refused
from .hub import Server, cached, publish
from .written import CLASSES, HERE, MEAN, NANO, STD, loaded_from, parse_flags, same, settings, write_run

TINY = "deit_tiny_distilled_patch16_224"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub and one of torch.hub, without a network."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "hub"


@pytest.fixture
def server(tmp_path, cache, monkeypatch):
    """A server whose files are those in tmp_path/served, which the hub's library takes for the hub."""
    from huggingface_hub import constants

    (tmp_path / "served").mkdir()
    made = Server(tmp_path / "served")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", made.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield made
    made.close()


# ---------------------------------------------------------------------------------------------------------------------
# By timm's name, from the cache that timm fills


def test_a_student_starts_from_what_timm_publishes(cache):
    theirs = publish(cache, TINY)
    student, notes = build_student(settings(TINY, 224, pretrained=True), 1000)
    assert isinstance(student, DeiT) and student.normalisation == (IMAGENET_MEAN, IMAGENET_STD)
    assert len(notes) == 1 and notes[0].startswith("starts from ") and "models--timm--" in notes[0]
    same(student, theirs, 224, rtol=1e-4, atol=1e-5)


def test_with_other_classes_and_another_size(cache):
    theirs = publish(cache, TINY).state_dict()
    student, notes = build_student(settings(TINY, 32, pretrained=True), 3, CLASSES)
    ours = student.state_dict()
    assert len(student.head.weight) == len(student.head_dist.weight) == 3
    for name in ours:
        assert name.startswith("head") or name == "pos_embed" or torch.equal(ours[name], theirs[name]), name
    assert torch.equal(ours["pos_embed"][:, :2], theirs["pos_embed"][:, :2]) and ours["pos_embed"].shape[1] == 2 + 4
    assert "interpolated from 196 patches to 2 x 2" in notes[-1] and "head starts fresh for 3 classes" in notes[1]


@pytest.mark.parametrize("name", [TINY, f"fastdeit_{TINY}.fb_in1k"])
def test_every_command_knows_the_name(cache, name):
    """load_model is behind predict, evaluate, export and teachers."""
    theirs = publish(cache, TINY)
    loaded = load_model(name)
    assert (loaded.name, loaded.architecture, loaded.input_size, loaded.crop_pct) == (name, TINY, 224, 0.9)
    assert (loaded.mean, loaded.std) == (IMAGENET_MEAN, IMAGENET_STD) and not has_moving_average(name)
    assert loaded.class_names[207] == "golden retriever"
    same(loaded.model, theirs, 224, rtol=1e-4, atol=1e-5)
    heads = loaded.model.forward_heads(torch.zeros(1, 3, 224, 224))
    assert len(heads) == 2 and heads[1] is not None
    taught = load_teacher(Distillation(teacher_model=name), HERE)
    assert torch.equal(taught.model.head_dist.weight, theirs.head_dist.weight)
    by_timm = timm.create_model(f"fastdeit_{TINY}", pretrained=True, num_classes=5)
    assert torch.equal(by_timm.norm.weight, theirs.norm.weight) and by_timm.num_classes == 5


@pytest.mark.parametrize("name", ["test_resnet", "test_vit.r160_in1k"])
def test_models_of_timm_alone(cache, name):
    theirs = publish(cache, name)
    loaded = load_model(name)
    assert (loaded.input_size, loaded.crop_pct, loaded.mean) == (160, 0.95, (0.5, 0.5, 0.5))
    same(loaded.model, theirs, 160)
    same(load_teacher(Distillation(teacher_model=name), HERE).model, theirs, 160)
    student, _ = build_student(settings(name, 160, pretrained=True), 3)
    for key, tensor in student.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[key]) or key.startswith(("fc", "head")), key
    assert student.num_classes == 3


def test_what_weights_of_a_name_bring_with_them(cache):
    """Size and crop, without a download; not against what was typed, nor the size of a recipe that changes it."""
    config = parse_flags("--pretrained", "--model", "deit_base_patch16_384")
    assert (config.data.input_size, config.data.eval_crop_ratio) == (384, 1.0)
    config = parse_flags("--pretrained", "--model", "test_vit", "--input-size", "64")
    assert (config.data.input_size, config.data.eval_crop_ratio) == (64, 0.95)
    config = parse_flags("--no-pretrained", "--finetune", "x", "--model", "deit_base_patch16_384")
    assert (config.data.input_size, config.data.eval_crop_ratio) == (224, 0.875)
    assert parse_flags("--recipe", "deit_base_384", "--pretrained").model.model == "deit_base_patch16_384"


def test_the_undistilled_student_starts_from_the_same_weights():
    """Of a student from random weights it is the plain variant, of one from published ones the same model."""
    assert undistilled(settings(TINY, 32)).model.model == "deit_tiny_patch16_224"
    assert undistilled(settings(TINY, 32, pretrained=True)).model.model == TINY


def test_all_of_our_models_that_timm_publishes_expect_imagenets_normalisation():
    """A logit cache is written without reading the student's weights (distill.cache_writer)."""
    found = {name: published.config_of_model(name) for name in ARCHITECTURES}
    told = {name: config["pretrained_cfg"] for name, config in found.items() if config}
    assert len(told) == 16
    assert {(said["mean"], said["std"]) for said in told.values()} == {(IMAGENET_MEAN, IMAGENET_STD)}


@pytest.mark.parametrize(
    "name, words",
    [
        (NANO, "timm publishes no weights of deit_nano_distilled_patch4_16: .* --no-pretrained"),
        ("deit_small_patch16_384", "timm publishes no weights of deit_small_patch16_384"),
        (f"{TINY}.fb_in22k", "publishes no weights 'fb_in22k' of .*; it has fb_in1k"),
        (
            "deit_smal_patch16_224",
            "no checkpoint deit_smal_patch16_224: .*did you mean deit_small_patch16_224",
        ),
    ],
)
def test_names_without_weights(cache, name, words):
    with pytest.raises(UserError, match=words):
        load_model(name)


# ---------------------------------------------------------------------------------------------------------------------
# hf-hub:ORG/NAME


def test_a_repository_of_each_kind(cache, tmp_path):
    model = write_run(tmp_path / "run")
    loaded = loaded_from(model, NANO)
    for kind in ("timm", "transformers"):
        folder = cached(cache, f"me/{kind}")
        folder.rmdir()
        export(loaded, kind, folder)
    folder = cached(cache, "me/ours")
    folder.rmdir()
    shutil.copytree((tmp_path / "run" / "last").resolve(), folder)
    for kind in ("timm", "transformers", "ours"):
        address = f"hf-hub:me/{kind}"
        read = load_model(address)
        assert (read.kind, read.name, read.classes, read.mean, read.crop_pct) == (kind, address, CLASSES, MEAN, 0.8)
        same(read.model, model, 16, rtol=1e-5, atol=1e-5)
        taught = load_teacher(Distillation(teacher_path=address), HERE)
        assert taught.classes == CLASSES and taught.name == address
        config = parse_flags("--finetune", address)
        assert (config.model.model, config.data.input_size) == (NANO, 16)
        student, _ = build_student(config, 3, CLASSES)
        same(student, model, 16, rtol=1e-5, atol=1e-5)
        assert student.normalisation == (MEAN, STD)


def test_a_download_from_the_hub_is_kept(cache, server, tmp_path):
    model = write_run(tmp_path / "run")
    export(loaded_from(model, NANO), "timm", tmp_path / "served/me/nano")
    same(load_model("hf-hub:me/nano").model, model, 16)
    assert [path.rpartition("/")[2] for path in server.asked] == ["config.json", "model.safetensors"]
    same(load_model("hf-hub:me/nano").model, model, 16)
    server.close()
    same(load_model("hf-hub:me/nano@main").model, model, 16)
    assert len(server.asked) == 2


def test_weights_in_several_files_from_the_hub(cache, server, tmp_path):
    model = write_run(tmp_path / "run")
    folder = tmp_path / "served/me/parts"
    export(loaded_from(model, NANO), "timm", folder)
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    files = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors").rename(folder / "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same(load_model("hf-hub:me/parts").model, model, 16)


def test_what_the_hub_has_not(cache, server, tmp_path):
    (tmp_path / "served/me/empty").mkdir(parents=True)
    for address, words in {
        "hf-hub:me/none": "the hub has no me/none at main for you: check the name, or log in",
        "hf-hub:me/empty": "hf-hub:me/empty has no config.json: it is no model",
        "hf-hub:a/b/c": "write hf-hub:ORG/NAME",
    }.items():
        with pytest.raises(UserError, match=words):
            load_model(address)
    (tmp_path / "served/me/empty/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"hf-hub:me/empty has no model\.safetensors or .*pytorch_model\.bin"):
        load_model("hf-hub:me/empty")


# ---------------------------------------------------------------------------------------------------------------------
# URLs


def weights_file(path: Path, seed: int = 0):
    torch.manual_seed(seed)
    model = create_model(NANO, num_classes=3).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict()}, path)
    return model


def test_a_url_is_downloaded_once_and_checked(cache, server, tmp_path):
    model = weights_file(tmp_path / "served/w.pth")
    digest = hashlib.sha256((tmp_path / "served/w.pth").read_bytes()).hexdigest()
    named = tmp_path / f"served/nano-{digest[:8]}.pth"
    (tmp_path / "served/w.pth").rename(named)
    url = f"{server.address}/resolve/main/{named.name}"
    loaded = load_model(url, name=NANO)
    same(loaded.model, model, 16)
    assert loaded.name == f"{NANO} from {url}"
    same(load_teacher(Distillation(teacher_path=url, teacher_model=NANO), HERE).model, model, 16)
    same(build_student(settings(finetune=url), 3)[0], model, 16)
    assert len(server.asked) == 1 and (tmp_path / "torch/hub/checkpoints" / named.name).is_file()
    named.rename(named.with_name("nano-00000000.pth"))
    with pytest.raises(UserError, match="invalid hash value"):
        load_model(f"{server.address}/resolve/main/nano-00000000.pth", name=NANO)


def test_files_of_one_name_from_two_addresses(cache, server, tmp_path):
    models = [weights_file(tmp_path / f"served/{place}/last.pth", seed) for seed, place in enumerate("ab")]
    for model, place in zip(models, "ab"):
        same(load_model(f"{server.address}/{place}/resolve/main/last.pth", name=NANO).model, model, 16)


def test_a_file_by_its_url(tmp_path):
    model = weights_file(tmp_path / "my weights.pth")
    same(load_model(f"file://{tmp_path}/my%20weights.pth", name=NANO).model, model, 16)
    assert sources.exists("file:///nowhere.pth")
    with pytest.raises(ValueError, match="no checkpoint at /nowhere"):
        load_model("file:///nowhere.pth", name=NANO)


# ---------------------------------------------------------------------------------------------------------------------
# Without a network: a sentence, which is true


def sentence(call) -> tuple[list[str], Path]:
    """(the addresses to fetch, where to put them) of a refusal."""
    with pytest.raises(UserError) as refusal:
        call()
    text = str(refusal.value)
    assert "\n" not in text and "cannot be downloaded" in text
    links, _, place = text.partition(": fetch ")[2].partition(" where there is a network, and put ")
    return links.split(" and "), Path(place.split()[-1])


def test_a_name_whose_weights_are_not_here(cache):
    links, place = sentence(lambda: build_student(settings(TINY, 224, pretrained=True), 3))
    assert links == [f"https://huggingface.co/timm/{TINY}.fb_in1k/resolve/main/model.safetensors"]
    model = create_model(TINY)
    place.mkdir(parents=True)
    save_file(model.state_dict(), place / "model.safetensors")
    student, _ = build_student(settings(TINY, 224, pretrained=True), 3)
    assert torch.equal(student.norm.weight, model.norm.weight)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(f"timm/{TINY}.fb_in1k", "model.safetensors")
    assert found == str(place / "model.safetensors"), "a place that other programs know, too"
    links, place = sentence(lambda: load_teacher(Distillation(teacher_model="test_vit"), HERE))
    assert links == ["https://huggingface.co/timm/test_vit.r160_in1k/resolve/main/model.safetensors"]
    place.mkdir(parents=True)
    theirs = timm.create_model("test_vit").eval()
    save_file(theirs.state_dict(), place / "model.safetensors")
    same(load_teacher(Distillation(teacher_model="test_vit"), HERE).model, theirs, 160)


def test_a_repository_that_is_not_here(cache, tmp_path):
    model = write_run(tmp_path / "run")
    links, place = sentence(lambda: load_model("hf-hub:me/nano"))
    assert links == [f"https://huggingface.co/me/nano/resolve/main/{f}" for f in ("config.json", "model.safetensors")]
    place.parent.mkdir(parents=True)
    export(loaded_from(model, NANO), "timm", place)
    same(load_model("hf-hub:me/nano").model, model, 16)


def test_a_url_that_does_not_answer(cache, tmp_path):
    url = "http://127.0.0.1:9/models/last.pth"
    links, place = sentence(lambda: load_model(url, name=NANO))
    assert links == ["it"]
    model = weights_file(place)
    same(load_model(url, name=NANO).model, model, 16)


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def test_fine_tuning_by_name(cache, colors, cli, tmp_path):
    """--recipe finetune needs no more than the images: its model's published weights are its start."""
    theirs = publish(cache, TINY)
    flags = "--input-size 32 --batch-size 12 --epochs 1 --warmup-epochs 0 --num-workers 1 --tracker none".split()
    arguments = ["--recipe", "finetune", "--model", TINY, "--data-path", colors, *flags]
    code, _, err = cli(train.main, *arguments, "--lr", "1e-9", "--output-dir", tmp_path / "run")
    assert code == 0, err
    trained = load_model(tmp_path / "run").model.state_dict()
    torch.testing.assert_close(trained["blocks.3.attn.qkv.weight"], theirs.blocks[3].attn.qkv.weight, rtol=0, atol=1e-6)
    code, out, err = cli(train.main, "--resume", tmp_path / "run")
    assert code == 0 and "is finished" in out, err


def test_an_address_in_every_command(colors, run, cli, tmp_path):
    url, image = f"file://{(run / 'last' / 'model.safetensors').resolve()}", colors / "val/red/0.png"
    shown = [cli(predict.main, source, image, "--json") for source in (run, url)]
    assert [code for code, *_ in shown] == [0, 0] and shown[0][1] == shown[1][1]
    measured = [cli(evaluate.main, source, "--data-path", colors, "--json") for source in (run, url)]
    assert json.loads(measured[0][1])["model"] == json.loads(measured[1][1])["model"]
    code, out, _ = cli(train.main, "--eval", "--resume", url, "--data-path", colors)
    assert code == 0 and f"{100 * json.loads(measured[0][1])['model']['both']['top1']:.2f}" in out
    assert cli(export_command, url, "--output", tmp_path / "timm")[0] == 0
    assert load_model(tmp_path / "timm").classes == ("blue", "green", "red")


def test_a_teacher_by_its_address(colors, run, cli, tmp_path):
    address = f"file://{run.resolve()}"
    flags = ["--data-path", colors, "--output-dir", tmp_path / "run", "--epochs", "1"]
    code, out, err = cli(train.main, *SMALL, *flags, "--distillation-type", "hard", "--teacher-path", address)
    assert code == 0 and f"teacher {address}" in out, err


def test_offline_in_one_sentence(cache, colors, cli):
    words = [f"timm/{TINY}.fb_in1k/resolve/main/model.safetensors", "and put it into"]
    refused(cli, train.main, "--model", TINY, "--pretrained", "--data-path", colors, words=words)
    refused(cli, predict.main, TINY, colors / "val/red/0.png", words=words)
