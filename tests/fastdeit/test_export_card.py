"""The model card of an export is what the hub's library reads, and says what the checkpoint knows."""

import json

import numpy as np
import pytest

from fastdeit.checkpoint import files
from fastdeit.export.__main__ import main
from fastdeit.export.formats import export
from fastdeit.models.deit import create_model
from fastdeit.models.loading import load_model

from .written import CLASSES, MEAN, NANO, STD, loaded_from, settings

hub = pytest.importorskip("huggingface_hub")

ACCURACY = {
    source: {head: {"top1": top1, "top5": 1.0, "loss": 0.1, "ece": 0.0} for head, top1 in values.items()}
    for source, values in {
        "model": {"cls": 0.9, "dist": 0.925, "both": 0.95125}, "ema": {"cls": 0.5, "dist": 0.6, "both": 0.7},
    }.items()
}  # fmt: skip


@pytest.fixture
def finished(tmp_path):
    """A run's folder with its accuracies, distilled and fine-tuned, as the trainer leaves it."""
    config = settings(NANO, 16, finetune="hf-hub:facebook/some-deit@main")
    config.run.recipe, config.data.data_path = "finetune", tmp_path / "secret" / "pets"
    config.distillation.distillation_type, config.optimization.curriculum = "hard", "8:0,16:9"
    config.distillation.teacher_path = str(tmp_path / "runs" / "teacher")
    model = create_model(NANO, num_classes=3, img_size=16).eval()
    described = {**files.describe(model, config, CLASSES, MEAN, STD), "accuracy": ACCURACY}
    state = model.state_dict()
    files.save(tmp_path / "run", described, step=1, model=state, ema=state, training={})
    return tmp_path / "run"


def card_of(folder):
    """As the hub's library reads it: its metadata parsed strictly."""
    text = (folder / "README.md").read_text()
    return hub.ModelCard(text), text


@pytest.mark.parametrize("weights, top1", [("model", [0.9, 0.925, 0.95125]), ("ema", [0.5, 0.6, 0.7])])
def test_the_card_of_a_run(finished, tmp_path, weights, top1):
    export(load_model(finished, weights=weights), "timm", tmp_path / "pets-deit")
    card, text = card_of(tmp_path / "pets-deit")
    data = card.data
    assert (data.model_name, data.library_name, data.pipeline_tag) == ("pets-deit", "timm", "image-classification")
    assert data.base_model == "facebook/some-deit" and {"fastdeit", "deit"} <= set(data.tags)
    assert [result.metric_value for result in data.eval_results] == top1
    assert {(r.task_type, r.dataset_name, r.metric_type) for r in data.eval_results} == {
        ("image-classification", "pets", "accuracy")
    }
    assert "| both heads, averaged | " + f"{100 * top1[2]:.2f} | 100.00 |" in text
    for said in (
        "| recipe | finetune |",
        "| distillation | hard |",
        "| teacher | runs/teacher |",
        "| curriculum | 8:0,16:9 |",
        "`ant`, `bee`, `cow`",
    ):
        assert said in text
    assert ("moving average" in text) == (weights == "ema")
    assert str(tmp_path) not in text, "where it was trained is for nobody else"


def test_every_format_has_one(finished, tmp_path):
    loaded = load_model(finished)
    for kind, library in {"transformers": "transformers", "torch-export": None}.items():
        pytest.importorskip("transformers")
        export(loaded, kind, tmp_path / kind)
        card, text = card_of(tmp_path / kind)
        assert card.data.library_name == library and "```python" in text
    assert load_model(tmp_path / "transformers").classes == CLASSES


def test_no_figure_that_was_not_measured(finished, tmp_path):
    """Not of another image size, and not of weights that come from elsewhere."""
    export(load_model(finished, input_size=32), "timm", tmp_path / "larger")
    export(loaded_from(create_model(NANO, num_classes=3), NANO), "timm", tmp_path / "other")
    for name in ("larger", "other"):
        card, text = card_of(tmp_path / name)
        assert not card.data.eval_results and "top-1" not in text and "Accuracy" not in text
    assert "## Training" not in card_of(tmp_path / "other")[1]


def test_names_that_yaml_and_markdown_could_misread(tmp_path):
    loaded = loaded_from(create_model(NANO, num_classes=3), NANO)
    export(loaded, "timm", tmp_path / "yes: no #1")
    assert card_of(tmp_path / "yes: no #1")[0].data.tags  # the card is read at all


def test_int8_beside_float32(run, colors, cli, tmp_path):
    """On the images it was not calibrated on: what onnxruntime answers, in the card and in preprocessing.json."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    import fastdeit

    folder = tmp_path / "int8"
    flags = ["--format", "onnx-int8", "--data-path", colors, "--output", folder, "--device", "cpu"]
    code, out, err = cli(main, run, *flags)
    assert code == 0, err
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.onnx", "preprocessing.json"]
    figures = json.loads((folder / "preprocessing.json").read_text())["quantised"]
    model, images = fastdeit.load(run, device="cpu"), sorted(map(str, colors.glob("val/*/*.png")))
    wanted = [path.split("/")[-2] for path in images]
    full = [prediction.label for prediction in model.predict(images)]
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"images": next(model._batches(images, 64)).contiguous().numpy()})[0]
    small = [model.classes[label] for label in logits.argmax(1)]
    assert figures["images"] == len(images) == 12 and figures["calibration_images"] == 32
    for name, labels in (("fp32", full), ("int8", small)):
        assert figures[f"top1_{name}"] == sum(map(str.__eq__, labels, wanted)) / 12
    assert figures["agreement"] == sum(map(str.__eq__, full, small)) / 12 >= 0.75
    assert figures["bytes_int8"] < 0.4 * figures["bytes_fp32"] and "in int8" in out
    assert f"| int8 | {100 * figures['top1_int8']:.2f} |" in card_of(folder)[1]
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["blue", "green", "red"]
    graph = onnx.load(folder / "model.onnx").graph
    weights = [
        tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    ]
    assert len(weights) == 1 + 6 * 4 + 2, "patch embedding, four layers a block, two heads"
    exact = model.logits(images).numpy()
    assert 0 < abs(logits - exact).max() < 0.25 * abs(exact).max()
    code, _, err = cli(main, run, "--format", "onnx", "--data-path", colors, "--output", tmp_path / "x")
    assert code == 2 and "the others take none" in err


def test_what_is_measured_of_int8(run, colors):
    """12 images, four of each class in order: one answers 0 always, the other 0 and 1 in turn."""
    from types import SimpleNamespace

    import fastdeit
    from fastdeit.export.quantise import measure

    def always(*pattern):
        def answer(_, inputs):
            return [np.eye(3)[[pattern[i % len(pattern)] for i in range(len(inputs["images"]))]]]

        return SimpleNamespace(run=answer)

    model = fastdeit.load(run, device="cpu")
    figures = measure(model._loaded, {"fp32": always(0), "int8": always(0, 1)}, colors, model._world)
    assert figures == {"images": 12, "agreement": 0.5, "top1_fp32": 4 / 12, "top1_int8": 4 / 12}
