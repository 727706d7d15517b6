"""What evaluate counts, recomputed from logits in float64, and the files that it writes."""

import argparse
import csv
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.special import log_softmax, softmax
from sklearn import metrics as sklearn_metrics

from fastdeit import errors, evaluate
from fastdeit.distributed.world import World
from fastdeit.evaluation import confusion
from fastdeit.evaluation.calibration import BINS, calibration_counts, draw_calibration, expected_calibration_error
from fastdeit.evaluation.confusion import Predictions, by_class, confusion_matrix, confusions, draw_confusion
from fastdeit.models.inference import load

from .conftest import COLORS, refused, write_folder
from .processes import start_ranks

MODEL = "deit_nano_distilled_patch4_16"
HERE = World(torch.device("cpu"))
HEADS = ("cls", "dist", "both")
VAL = {"blue": 17, "green": 13, "red": 9}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """VAL images whose colours lie anywhere between those that the classes are known by: many are taken for others."""
    root, random = tmp_path_factory.mktemp("mixed"), np.random.default_rng(1)
    known = np.array(list(COLORS.values()))
    for name, count in VAL.items():
        (root / "val" / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.dirichlet([0.6] * 3) @ known + random.normal(0, 25, (20, 20, 3))
            Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(root / "val" / name / f"{i:02d}.png")
    return root


@pytest.fixture
def evaluated(cli, run, mixed):
    """evaluated(*arguments) -> the printed JSON of an evaluation on `mixed`."""

    def call(*arguments, source=run, data=mixed):
        code, out, err = cli(evaluate.main, source, "--data-path", data, "--json", "--device", "cpu", *arguments)
        assert code == 0, err
        return json.loads(out)

    return call


def logits_of(run, data, weights="model", **settings):
    """({head: (images, classes) float64 logits}, labels (images,)), batch by batch of odd size."""
    classifier = load(run, device="cpu", weights=weights, **settings)
    logits, labels = {head: [] for head in HEADS}, []
    for batch in classifier.evaluation_loader(data, 7, HERE):
        counted = batch.indices >= 0
        labels.append(batch.labels[counted])
        with torch.no_grad():
            cls_logits, dist_logits = classifier.model.forward_heads(classifier.prepare(batch)[counted])
        for head, values in zip(HEADS, (cls_logits, dist_logits, (cls_logits + dist_logits) / 2)):
            logits[head].append(values.double())
    return {head: torch.cat(parts).numpy() for head, parts in logits.items()}, torch.cat(labels).numpy()


def ece(logits, labels, bins=15):
    """Guo et al. (2017), equation 3, as it stands there."""
    probabilities = softmax(logits.astype(np.float64), axis=1)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    total = 0.0
    for low, high in zip(np.arange(bins) / bins, np.arange(1, bins + 1) / bins):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def by_hand(logits, labels):
    """What evaluate says of one head."""
    order = np.argsort(-logits, axis=1)
    return {
        "top1": (order[:, 0] == labels).mean(),
        "top5": (order[:, :5] == labels[:, None]).any(1).mean(),
        "loss": -log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean(),
        "ece": ece(logits, labels),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_it_agrees_with_the_run(run, colors, cli, evaluated):
    result = evaluated(data=colors)
    summary = json.loads((run / "summary.json").read_text())
    assert {head: value["top1"] for head, value in result["model"].items()} == pytest.approx(summary)
    code, out, _ = cli(evaluate.main, run, "--data-path", colors, "--device", "cpu")
    assert code == 0
    for words in ("both heads, averaged", "moving average", "12 images of 3 classes at 16 x 16 pixels"):
        assert words in out, words


def test_figures_and_files_against_the_logits(run, mixed, evaluated, tmp_path):
    result = evaluated("--output", tmp_path / "out", "--batch-size", "5")
    assert result["data"] == {"images": 39, "classes": 3, "unreadable": {}, "input_size": 16}
    columns, labels = {}, np.repeat([0, 1, 2], list(VAL.values()))
    for source, prefix in (("model", ""), ("ema", "ema_")):
        logits, seen = logits_of(run, mixed, source)
        assert (seen == labels).all() and result[source].keys() == set(HEADS)
        for head in HEADS:
            assert result[source][head] == pytest.approx(by_hand(logits[head], labels), rel=1e-5)
            columns[f"{prefix}top1_{head}"] = logits[head].argmax(1)
    assert 0.2 < result["model"]["both"]["top1"] < 0.95  # or the files would show nothing
    assert result["model"] != result["ema"]
    whole = evaluated("--batch-size", "64")
    assert all(
        whole[source][head] == pytest.approx(result[source][head]) for source in ("model", "ema") for head in HEADS
    )

    assert json.loads((tmp_path / "out" / "accuracy.json").read_text()) == result
    header, *rows = csv.reader((tmp_path / "out" / "classes.csv").open())
    assert header == ["class", "images", *columns]
    assert [row[:2] for row in rows] == [[name, str(count)] for name, count in VAL.items()]
    for i, answers in enumerate(columns.values()):
        matrix = sklearn_metrics.confusion_matrix(labels, answers, labels=[0, 1, 2], normalize="true")
        assert [float(row[2 + i]) for row in rows] == pytest.approx(np.diag(matrix), abs=5.1e-5)
    pictures = {"confusion.png", "confusion_ema.png", "calibration.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == pictures | {"accuracy.json", "classes.csv"}
    for name in pictures:
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 1000 and picture.height > 400
            assert len(np.unique(np.asarray(picture.convert("L")))) > 50


def test_another_input_size(run, mixed, evaluated):
    result = evaluated("--input-size", "32", "--eval-crop-ratio", "1")
    assert result["data"]["input_size"] == 32
    logits, labels = logits_of(run, mixed, input_size=32, crop_pct=1.0)
    trained, _ = logits_of(run, mixed)
    assert not np.allclose(logits["both"], trained["both"], atol=1e-3)
    for head in HEADS:
        assert result["model"][head] == pytest.approx(by_hand(logits[head], labels), rel=1e-5)


def test_other_projects_files_give_the_same(run, cli, evaluated, tmp_path):
    """timm's state dict, facebookresearch/deit's pickle with moving average and settings, an export to timm."""
    pytest.importorskip("timm", minversion="1.0.31")  # older ones do not read what is written for timm
    from fastdeit.export.__main__ import main as export

    state, ema = (load_file(run / "last" / f"{name}.safetensors") for name in ("model", "ema"))
    crop_ratio = json.loads((run / "last" / "config.json").read_text())["eval_crop_ratio"]
    options = ["--model", MODEL, "--eval-crop-ratio", str(crop_ratio)]
    expected = evaluated()
    save_file(state, tmp_path / "timm.safetensors")
    assert evaluated(*options, source=tmp_path / "timm.safetensors") == {
        "model": expected["model"], "data": expected["data"],
    }  # fmt: skip
    saved = {"model": state, "model_ema": ema, "args": argparse.Namespace(lr=5e-4), "epoch": 299}
    torch.save(saved, tmp_path / "checkpoint.pth")
    assert evaluated(*options, source=tmp_path / "checkpoint.pth") == expected
    assert cli(export, run, "--format", "timm", "--output", tmp_path / "exported")[0] == 0
    result = evaluated(source=tmp_path / "exported")
    assert result.keys() == {"model", "data"} and result["data"] == expected["data"]
    for head in HEADS:
        assert result["model"][head] == pytest.approx(expected["model"][head], rel=1e-5)


def test_a_model_with_one_head(evaluated, tmp_path):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    options = ["--model", "test_vit", "--output", tmp_path / "out"]
    result = evaluated(*options, source=tmp_path / "vit.safetensors")
    assert result.keys() == {"model", "data"} and result["model"].keys() == {"cls"}
    assert next(csv.reader((tmp_path / "out" / "classes.csv").open())) == ["class", "images", "top1_cls"]
    assert not (tmp_path / "out" / "confusion_ema.png").exists()


def test_unreadable_images_do_not_count(run, cli, evaluated, tmp_path):
    root = write_folder(tmp_path / "data", train=1, val=6, size=60)
    good = evaluated(data=root)
    whole = (root / "val" / "red" / "5.png").read_bytes()
    (root / "val" / "red" / "6.png").write_bytes(whole[: len(whole) // 2])
    (root / "val" / "blue" / "6.png").write_bytes(b"")
    result = evaluated("--max-bad", "0.2", data=root)
    for head in HEADS:
        assert result["model"][head] == pytest.approx(good["model"][head])
    unreadable = result["data"].pop("unreadable")
    assert result["data"] == {"images": 18, "classes": 3, "input_size": 16}
    assert sorted(unreadable) == sorted(str(root / "val" / name) for name in ("red/6.png", "blue/6.png"))
    assert "truncated" in unreadable[str(root / "val" / "red" / "6.png")]
    code, out, _ = cli(evaluate.main, run, "--data-path", root, "--max-bad", "0.2")
    assert code == 0 and "18 images of 3 classes" in out and "2 images could not be read and do not count" in out
    refused(cli, evaluate.main, run, "--data-path", root, words=["cannot be read", "--max-bad"])


def test_bad_input(run, mixed, cli, tmp_path):
    refused(cli, evaluate.main, tmp_path, "--data-path", mixed, words=[str(tmp_path), "checkpoint"])
    others = write_folder(tmp_path / "data", train=1, val=1, colors={"cat": (9, 9, 9), "dog": (200, 200, 200)})
    refused(cli, evaluate.main, run, "--data-path", others, words=["cat"])
    (tmp_path / "file").touch()
    refused(cli, evaluate.main, run, "--data-path", mixed, "--output", tmp_path / "file", words=["another folder"])
    refused(cli, evaluate.main, run, "--data-path", mixed, "--batch-size", "0", words=["--batch-size 0"])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text('{"model": ')
    refused(cli, evaluate.main, damaged, "--data-path", mixed, words=["config.json", "cannot be read"])
    (damaged / "config.json").write_text('{"architecture": "test_resnet"}')
    (damaged / "model.safetensors").write_bytes(bytes(100))
    refused(cli, evaluate.main, damaged, "--data-path", mixed, words=[str(damaged), "not a readable safetensors file"])


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


class Evaluate:
    """What a rank does in place of a run."""

    def __init__(self, *arguments):
        self.arguments = [str(argument) for argument in arguments]

    def __call__(self):
        sys.argv = ["evaluate", *self.arguments]
        errors.run(evaluate.main)


def test_two_processes_count_as_one(run, mixed, evaluated, tmp_path):
    """By fours: the last global batch is not full. Each rank meets a damaged image that the other does not see."""
    data = shutil.copytree(mixed, tmp_path / "data")
    for name in ("00", "04"):
        whole = (data / "val" / "blue" / f"{name}.png").read_bytes()
        (data / "val" / "blue" / f"{name}_cut.png").write_bytes(whole[: len(whole) // 2])
    (data / "val" / "red" / "empty.png").touch()
    options = ["--batch-size", "4", "--max-bad", "0.2"]
    expected = evaluated(*options, "--output", tmp_path / "one", data=data)
    assert expected["data"]["images"] == 39 and len(expected["data"]["unreadable"]) == 3

    command = Evaluate(run, "--data-path", data, *options, "--device", "cpu", "--output", tmp_path / "two")
    ranks = start_ranks(2, logs=tmp_path, first=command)
    assert [rank.wait(120) for rank in ranks] == [0, 0], ranks[0].text + ranks[1].text
    result = json.loads((tmp_path / "two" / "accuracy.json").read_text())
    assert result["data"] == expected["data"]
    for source in ("model", "ema"):
        for head in HEADS:
            one, two = expected[source][head], result[source][head]
            assert (one["top1"], one["top5"]) == (two["top1"], two["top5"])
            assert two == pytest.approx(one, rel=1e-6)
    assert (tmp_path / "two" / "classes.csv").read_text() == (tmp_path / "one" / "classes.csv").read_text()
    assert "both heads, averaged" in ranks[0].text and "both heads" not in ranks[1].text


# ---------------------------------------------------------------------------------------------------------------------
# Calibration


def random_logits(images, classes, spread, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(0, spread, (images, classes)).astype(np.float32), random.integers(0, classes, images)


# Spread 0.3: nearly uniform answers, which leaves the upper bins empty; 30: nearly certain ones, only the last is full.
@pytest.mark.parametrize("classes, spread", [(2, 3.0), (10, 0.3), (10, 2.0), (10, 30.0), (1000, 4.0)])
def test_calibration_error_is_the_papers_formula(classes, spread):
    logits, labels = random_logits(2000, classes, spread)
    parts = [
        calibration_counts(torch.from_numpy(logits[part]), torch.from_numpy(labels[part]))
        for part in (slice(0, 700), slice(700, 701), slice(701, 2000))
    ]
    counts = sum(parts)
    assert counts.shape == (BINS, 3) and counts[:, 0].sum() == 2000
    assert expected_calibration_error(counts) == pytest.approx(ece(logits, labels), abs=1e-6)
    if spread in (0.3, 30.0):
        assert (counts[:, 0] == 0).any()


def test_calibration_leaves_out_what_has_no_label():
    logits, labels = random_logits(300, 10, 2.0)
    labels[::3] = -100
    counts = calibration_counts(torch.from_numpy(logits), torch.from_numpy(labels))
    expected = ece(logits[labels >= 0], labels[labels >= 0])
    assert expected_calibration_error(counts) == pytest.approx(expected, abs=1e-6)


def test_calibration_at_the_ends():
    """Certain answers: all in the last bin; right ones have no error, wrong ones an error of 1."""
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]])
    for labels, error in (([0, 1], 0.0), ([1, 0], 1.0), ([0, 0], 0.5)):
        counts = calibration_counts(logits, torch.tensor(labels))
        assert counts[:-1].sum() == 0 and counts[-1].tolist() == [2, 2 * (1 - error), 2]
        assert expected_calibration_error(counts) == error


def test_a_diagram_with_empty_bins(tmp_path):
    logits, labels = random_logits(50, 10, 0.3)
    counts = calibration_counts(torch.from_numpy(logits), torch.from_numpy(labels))
    draw_calibration({"few": counts, "the same": counts}, tmp_path / "diagram.png")
    with Image.open(tmp_path / "diagram.png") as picture:
        assert picture.size in ((792, 506), (792, 505))  # before matplotlib 3.11


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, before they are."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (save(self, *a, **k), figures.append(self)))
    return figures


def test_no_line_is_drawn_through_nearly_empty_bins(tmp_path, drawn):
    counts = np.zeros((BINS, 3))
    counts[3], counts[9], counts[12], counts[14] = (1, 0, 0.25), (9, 9, 5.6), (10, 7, 8.4), (340, 336, 338)
    draw_calibration({"digits": counts}, tmp_path / "diagram.png")
    _, line, dots = drawn[0].axes[0].lines
    expected = np.full((BINS, 2), np.nan)
    expected[12], expected[14] = (0.84, 0.7), (338 / 340, 336 / 340)
    np.testing.assert_allclose(line.get_xydata(), expected)
    np.testing.assert_allclose(dots.get_xydata(), [(0.25, 0), (5.6 / 9, 1)])
    assert line.get_linestyle() == "-" and dots.get_linestyle() == "None"


# ---------------------------------------------------------------------------------------------------------------------
# Confusion


def predictions_and_labels(images, classes, seed=0):
    """Half of the predictions correct, the others anything; one in ten unread, one in ten unlabelled."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, images)
    predictions = np.where(random.random(images) < 0.5, labels, random.integers(0, classes, images))
    predictions[random.random(images) < 0.1] = -1
    labels[random.random(images) < 0.1] = -100
    return predictions, labels


def test_confusion_is_scikit_learns():
    predictions, labels = predictions_and_labels(400, 12)
    labels[labels == 5] = 6  # a class without images
    counted = (predictions >= 0) & (labels >= 0)
    matrix = sklearn_metrics.confusion_matrix(labels[counted], predictions[counted], labels=range(12))
    images, right = by_class(predictions, labels, 12)
    assert images.tolist() == matrix.sum(1).tolist() and right.tolist() == np.diag(matrix).tolist()
    assert images[5] == 0 and not confusion_matrix(predictions, labels, 12)[5].any()
    np.testing.assert_allclose(
        confusion_matrix(predictions, labels, 12),
        sklearn_metrics.confusion_matrix(labels[counted], predictions[counted], labels=range(12), normalize="true"),
    )
    listed = confusions(predictions, labels, 12)
    wrong = {(i, j): matrix[i, j] for i in range(12) for j in range(12) if i != j and matrix[i, j]}
    assert {pair[:2]: pair[2] for pair in listed} == wrong and len(listed) == len(wrong)
    assert [pair[2] for pair in listed] == sorted(wrong.values(), reverse=True)


def test_more_classes_than_cells(monkeypatch):
    """Neighbouring classes share a cell."""
    predictions, labels = predictions_and_labels(900, 12)
    monkeypatch.setattr(confusion, "CELLS", 4)
    counted = (predictions >= 0) & (labels >= 0)
    matrix = sklearn_metrics.confusion_matrix(labels[counted] // 3, predictions[counted] // 3, normalize="true")
    np.testing.assert_allclose(confusion_matrix(predictions, labels, 12), matrix)


def test_predictions_are_kept_by_index():
    """Batches in any order; padding has index -1, and what never came stays -1."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 7, generator=random)
    predictions = Predictions(11, HERE.device)
    for indices in ([8, 9, 10, -1], [0, 1, -1, 3], [4, 5, 6, -1]):
        predictions.add({"cls": logits[indices], "both": -logits[indices]}, torch.tensor(indices))
    expected = logits.argmax(1).numpy()[:11]
    expected[[2, 7]] = -1
    result = predictions.result(HERE)
    assert result.keys() == {"cls", "both"} and result["cls"].tolist() == expected.tolist()
    expected = (-logits).argmax(1).numpy()[:11]
    expected[[2, 7]] = -1
    assert result["both"].tolist() == expected.tolist()


@pytest.mark.parametrize("classes", [2, 31, 1100])
def test_pictures_of_any_number_of_classes(tmp_path, classes):
    predictions, labels = predictions_and_labels(500, classes)
    names = [f"class {i} at $5, {'or more ' * 5} and $1^{{0$" for i in range(classes)]
    draw_confusion(tmp_path / "confusion.png", names, predictions, labels, "title")
    draw_confusion(tmp_path / "right.png", names, labels, labels, "not one wrong")
    for name in ("confusion.png", "right.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (1400, 750)


@pytest.mark.parametrize(
    "names", [list("0123456789"), ["blue", "green"], [f"a class of a rather long name {i}" for i in range(30)]]
)
def test_nothing_written_on_the_picture_is_cut(tmp_path, drawn, names):
    predictions, labels = predictions_and_labels(500, len(names))
    draw_confusion(tmp_path / "confusion.png", names, predictions, labels, "title")
    (figure,) = drawn
    (width, height), renderer = figure.bbox.size, FigureCanvasAgg(figure).get_renderer()
    written = {text.get_text(): text.get_window_extent(renderer) for text in figure.findobj(Text)}
    for text in ("true class", "predicted class", "title", "% of the class", "images"):
        box = written[text]
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
