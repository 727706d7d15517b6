"""Every export is loaded by its own library and answers as the model it came from."""

import json
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from fastdeit.errors import UserError
from fastdeit.export import formats
from fastdeit.export.__main__ import main
from fastdeit.export.formats import example_images, export
from fastdeit.models.architectures import Architecture
from fastdeit.models.deit import DeiT, create_model
from fastdeit.models.loading import LoadedModel

pytest.importorskip("timm", minversion="1.0.31")  # older ones do not read what is written for timm

CLASSES = ("cat", "dog", "axolotl")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def loaded_from(model, name, size=16, crop_pct=0.8) -> LoadedModel:
    """`model` as load_model would return it."""
    return LoadedModel(
        name=name, architecture=name, model=model, classes=CLASSES, input_size=size, mean=MEAN, std=STD,
        crop_pct=crop_pct,
    )  # fmt: skip


def trained(kind="distilled", size=(16, 16)) -> LoadedModel:
    """A model of two blocks with lively weights."""
    torch.manual_seed(0)
    arch = Architecture(width=48, depth=2, heads=3, patch_size=4, img_size=16, distilled=kind == "distilled")
    model = DeiT(arch, num_classes=3, img_size=size, drop_path=0.1, attention="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    name = "deit_nano_distilled_patch4_16" if kind == "distilled" else "deit_nano_patch4_16"
    return loaded_from(model, name)


def same(exported: torch.Tensor, original: LoadedModel, images: torch.Tensor) -> bool:
    with torch.no_grad():
        torch.testing.assert_close(exported, original.model.eval()(images), rtol=1e-5, atol=1e-5)
    return True


# timm


@pytest.mark.parametrize("kind", ["distilled", "plain"])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_timm(tmp_path, kind, size):
    original = trained(kind, size)
    assert export(original, "timm", tmp_path / "out") < 1e-5
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert same(model(example_images(original, 4)), original, example_images(original, 4))
    data = resolve_model_data_config(model)
    assert (data["input_size"], tuple(data["mean"]), tuple(data["std"])) == ((3, *size), MEAN, STD)
    assert data["crop_pct"] == 0.8
    assert model.pretrained_cfg["label_names"] == list(CLASSES)
    other = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7)
    assert other.head.out_features == 7, "timm knows which layers to replace for other classes"


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_timm_by_its_own_names(tmp_path, name):
    model = create_model(name, num_classes=3, img_size=32)
    original = loaded_from(model, name, 32, 0.9)
    export(original, "timm", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["architecture"] == name
    read = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert same(read(example_images(original, 2)), original, example_images(original, 2))


def test_timm_models_travel_too(tmp_path):
    """A fitted teacher is any model of timm."""
    model = timm.create_model("resnet10t", num_classes=3)
    original = loaded_from(model, "resnet10t", 32, 0.9)
    export(original, "timm", tmp_path / "out")
    read = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert same(read(example_images(original, 2)), original, example_images(original, 2))


def test_a_timm_too_old_to_read_it(tmp_path, monkeypatch):
    monkeypatch.setattr(timm, "__version__", "1.0.22")
    with pytest.raises(UserError, match=r"timm 1\.0\.22 .*pip install 'timm>=1\.0\.31'"):
        export(trained(), "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# transformers


@pytest.mark.parametrize("kind", ["distilled", "plain"])
def test_transformers(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    original = trained(kind)
    assert export(original, "transformers", tmp_path / "out") < 1e-5
    images = example_images(original, 4)
    if kind == "distilled":
        model = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path / "out").eval()
        answer = model(images)
        with torch.no_grad():
            heads = original.model.forward_heads(images)
        torch.testing.assert_close((answer.cls_logits, answer.distillation_logits), heads, rtol=1e-5, atol=1e-5)
    else:
        answer = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()(images)
    assert same(answer.logits, original, images)
    general = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert general.config.id2label == dict(enumerate(CLASSES))
    assert general.config.label2id == {name: number for number, name in enumerate(CLASSES)}


def test_transformers_prepares_images_as_we_do(tmp_path):
    """Its processor against timm's evaluation transform, which is the meaning of record: one grey level apart at most,
    where the two round the resized pixels differently."""
    transformers = pytest.importorskip("transformers")
    export(trained(), "transformers", tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
    image = coarse.resize((60, 45), Image.BICUBIC)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    transform = create_transform((3, 16, 16), interpolation="bicubic", mean=MEAN, std=STD, crop_pct=0.8)
    assert (theirs - transform(image)).abs().max() < 1.01 / 255 / min(STD)


def test_transformers_has_no_deit3(tmp_path):
    pytest.importorskip("transformers")
    model = create_model("deit3_small_patch16_224", num_classes=3, img_size=16)
    original = loaded_from(model, "deit3_small_patch16_224", 16, 0.9)
    with pytest.raises(UserError, match="no counterpart of deit3_small_patch16_224; export it with --format timm"):
        export(original, "transformers", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Graphs


@pytest.mark.parametrize("kind, opset", [("distilled", 23), ("plain", 20)])
def test_onnx(tmp_path, kind, opset):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    original = trained(kind)
    assert export(original, "onnx", tmp_path / "out", opset=opset) < 1e-4
    path = tmp_path / "out" / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path)
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", opset)]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    assert (images.name, images.shape) == ("images", ["batch", 3, 16, 16])
    for batch in (1, 2, 7):
        (answer,) = session.run(["logits"], {"images": example_images(original, batch).numpy()})
        assert same(torch.from_numpy(answer), original, example_images(original, batch))
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert json.loads((tmp_path / "out/preprocessing.json").read_text())["mean"] == list(MEAN)


def test_torch_export(tmp_path):
    original = trained()
    assert export(original, "torch-export", tmp_path / "out") < 1e-5
    extra = {"preprocessing.json": ""}
    program = torch.export.load(tmp_path / "out" / "model.pt2", extra_files=extra).module()
    for batch in (1, 7):
        assert same(program(example_images(original, batch)), original, example_images(original, batch))
    assert json.loads(extra["preprocessing.json"])["classes"] == list(CLASSES)


def test_aotinductor(tmp_path):
    original = trained("plain")
    assert export(original, "aotinductor", tmp_path / "out") < 1e-4
    package = torch._inductor.aoti_load_package(str(tmp_path / "out" / "model.pt2"))
    assert same(package(example_images(original, 5)), original, example_images(original, 5))


# The folder


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists already: give another --output"):
        export(trained(), "timm", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_files_are_as_readable_as_their_folder(tmp_path):
    export(trained(), "timm", tmp_path / "out")
    mode = (tmp_path / "out").stat().st_mode & 0o666
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {mode}


@pytest.mark.parametrize("wrong", [1e-2, float("nan")])
def test_a_wrong_export_is_noticed_and_removed(tmp_path, monkeypatch, wrong):
    """The weights on disk are bent after writing; reading them back must tell."""
    write = formats.write_timm

    def bent(original, folder):
        read = write(original, folder)
        with torch.no_grad():
            read.head.bias += wrong
        return read

    monkeypatch.setattr(formats, "write_timm", bent)
    with pytest.raises(RuntimeError, match="the timm export gives other logits: one is off by"):
        export(trained(), "timm", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_model_keeps_its_attention(tmp_path):
    original = trained()
    original.model.set_attention("fused")
    before = original.model.blocks[0].attn.attend
    export(original, "timm", tmp_path / "out")
    assert original.model.blocks[1].attn.attend is before


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime is not installed: pip install 'fastdeit\[export\]' brings it"):
        export(trained(), "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# The command


def checkpoint_folder(run):
    """A checkpoint as the trainer writes it, with a moving average that differs from the weights."""
    from fastdeit.checkpoint import files
    from fastdeit.config import Config

    config = Config()
    config.model.model, config.data.input_size = "deit_nano_distilled_patch4_16", 16
    model, average = (create_model(config.model.model, num_classes=3, drop_path=0.1) for _ in range(2))
    description = files.describe(model, config, CLASSES, MEAN, STD)
    files.save(run, description, step=3, model=model.state_dict(), ema=average.state_dict(), training={}, best=True)
    return model.eval(), average.eval()


@pytest.mark.parametrize("flags", [[], ["--ema"], ["--input-size", "24"]])
def test_the_command(tmp_path, monkeypatch, capsys, flags):
    model, average = checkpoint_folder(tmp_path / "run")
    arguments = [
        str(tmp_path / "run"),
        "--output",
        str(tmp_path / "out"),
        "--format",
        "timm",
        "--device",
        "cpu",
        *flags,
    ]
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    main()
    said = capsys.readouterr().out.strip().removesuffix(" at most")
    said, difference = said.rsplit(" ", 1)
    assert said == f"wrote {tmp_path / 'out'}; read back, its logits differ by"
    assert float(difference) < 1e-6
    read = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert read.pretrained_cfg["label_names"] == list(CLASSES)
    size = 24 if "24" in flags else 16
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        if size == 16:
            expected = (average if flags else model)(images)
            torch.testing.assert_close(read(images), expected, rtol=1e-5, atol=1e-5)
        else:
            assert read(images).shape == (2, 3)


def test_what_is_no_checkpoint_of_ours(tmp_path, monkeypatch):
    torch.save(create_model("deit_nano_patch4_16").state_dict(), tmp_path / "deit.pth")
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path / "deit.pth"), "--output", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"deit\.pth does not say which model it is of: give --model NAME"):
        main()
    assert not (tmp_path / "out").exists()
