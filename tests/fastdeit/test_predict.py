"""What predict says of which images, in which form, and what it does with images that it cannot read."""

import csv
import io
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastdeit import errors, predict
from fastdeit.distributed.world import World
from fastdeit.models.deit import IMAGENET_MEAN, IMAGENET_STD, create_model
from fastdeit.models.inference import load
from fastdeit.pipelines import eval_loader
from fastdeit.predict import Prediction, as_line, image_files

from .conftest import COLORS, refused

MODEL = "deit_nano_distilled_patch4_16"
HERE = World(torch.device("cpu"))


def picture(path, seed, height=16, width=16):
    """A file of one colour with noise, all channels different."""
    random = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random.uniform(30, 220, 3) + random.normal(0, 25, (height, width, 3))
    Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(path)
    return str(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eleven images as small as the model takes them, so that nothing needs to be resized; and no other files."""
    folder = tmp_path_factory.mktemp("images")
    return [picture(folder / f"{i:02d}.png", seed=i) for i in range(11)]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """name: cause, for files that look like images from outside, from their header, and up to their body."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "text.jpg").write_text("this is no image")
    whole = open(picture(folder / "cut.png", seed=0, height=100, width=100), "rb").read()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    causes = {"text.jpg": "not an image", "cut.png": "truncated", "absent.jpg": "there is no such file"}
    return {str(folder / name): cause for name, cause in causes.items()}


def by_hand(run, images, head="both", weights="model"):
    """(images, classes) probabilities, without any of predict's code."""
    model = create_model(MODEL, num_classes=len(COLORS)).eval()
    model.load_state_dict(load_file(run / "last" / f"{weights}.safetensors"))
    pixels = np.stack([np.asarray(Image.open(image)) for image in images]) / 255
    inputs = torch.from_numpy((pixels - IMAGENET_MEAN) / IMAGENET_STD).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        cls_logits, dist_logits = model.forward_heads(inputs)
    logits = {"cls": cls_logits, "dist": dist_logits, "both": (cls_logits + dist_logits) / 2}[head]
    return logits.double().softmax(1).numpy()


def table(lines, classes=tuple(COLORS)):
    """(images, classes) probabilities from lines of --json that name all classes."""
    rows = [{prediction["class"]: prediction["probability"] for prediction in line["classes"]} for line in lines]
    return np.array([[row[name] for name in classes] for row in rows])


@pytest.fixture
def ask(cli, run):
    """ask(*arguments) -> (exit code, stdout, stderr), of the run on the CPU with the whole of each image."""

    def call(*arguments, source=run):
        return cli(predict.main, source, "--device", "cpu", "--eval-crop-ratio", "1", *arguments)

    return call


@pytest.fixture
def predictions(ask):
    """The lines of --json, parsed; refuses an exit code other than 0."""

    def call(*arguments, **options):
        code, out, err = ask(*arguments, "--json", **options)
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()]

    return call


# ---------------------------------------------------------------------------------------------------------------------
# Which files


@pytest.fixture
def tree(tmp_path, monkeypatch):
    names = "b.png a.jpg notes.txt .hidden.png [1].png sub/c.PNG sub/deep/a.jpg sub/.git/d.png"
    for name in names.split():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).touch()
    (tmp_path / "tree" / "empty").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["tree"], "[1].png a.jpg b.png sub/c.PNG sub/deep/a.jpg"),
        (["tree/sub/"], "sub/c.PNG sub/deep/a.jpg"),
        (["tree/b.png", "tree/a.jpg", "tree/notes.txt"], "b.png a.jpg notes.txt"),
        (["tree/*.jpg"], "a.jpg"),
        (["tree/*"], "[1].png a.jpg b.png sub/c.PNG sub/deep/a.jpg"),
        (["tree/**/*.jpg"], "a.jpg sub/deep/a.jpg"),
        (["tree/**"], "[1].png a.jpg b.png sub/c.PNG sub/deep/a.jpg"),
        (["tree/[ab].*"], "a.jpg b.png"),
        (["tree/[1].png"], "[1].png"),
        (["tree/b.png", "tree", "tree/./b.png", "tree/a.jpg"], "b.png [1].png a.jpg sub/c.PNG sub/deep/a.jpg"),
        (["tree/absent.jpg", "tree/.hidden.png"], "absent.jpg .hidden.png"),
    ],
)
def test_which_files_are_meant(tree, arguments, expected):
    assert image_files(arguments) == [f"tree/{name}" for name in expected.split()]


def test_a_pattern_below_the_home_folder(tree, monkeypatch):
    monkeypatch.setenv("HOME", os.path.abspath("tree"))
    assert image_files(["~/*.jpg"]) == [os.path.abspath("tree/a.jpg")]


@pytest.mark.parametrize(
    "argument, words",
    [
        ("tree/empty", ["tree/empty", "no images", ".png"]),
        ("tree/*.zip", ["tree/*.zip", "matches nothing"]),
        ("tree/*.txt", ["tree/*.txt", "matches no images", ".png"]),
        (None, ["at least one image"]),
    ],
)
def test_nothing_found_is_named(tree, cli, run, argument, words):
    refused(cli, predict.main, run, *([argument, "tree/b.png"] if argument else []), words=words)


# ---------------------------------------------------------------------------------------------------------------------
# Which predictions


@pytest.mark.parametrize("options, of", [
    ("", {}), ("--head cls", {"head": "cls"}), ("--head dist", {"head": "dist"}),
    ("--ema", {"weights": "ema"}), ("--ema --head cls", {"weights": "ema", "head": "cls"}),
])  # fmt: skip
def test_the_predictions_are_those_of_the_model(predictions, run, images, options, of):
    lines = predictions(*images, *options.split())
    expected = by_hand(run, images, **of)
    np.testing.assert_allclose(table(lines), expected, rtol=1e-4, atol=1e-7)
    for line, row in zip(lines, expected):
        assert [prediction["class"] for prediction in line["classes"]] == [list(COLORS)[i] for i in row.argsort()[::-1]]


def test_the_predictions_are_those_that_evaluate_counts(predictions, run, colors):
    """Resized and cropped as there: the images of val, which are larger than the model's input."""
    classifier = load(run, device="cpu", crop_pct=0.7)
    index = classifier.evaluation_loader(colors, 64, world=HERE).index
    (batch,) = eval_loader(index, batch_size=len(index), input_size=16, crop_pct=0.7)
    expected = classifier.logits(classifier.prepare(batch))["both"].double().softmax(1).numpy()
    lines = predictions(colors / "val", "--eval-crop-ratio", "0.7")
    assert [line["image"] for line in lines] == [index.name(i) for i in range(len(index))]
    np.testing.assert_allclose(table(lines), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_the_order_is_that_of_the_arguments(predictions, run, images, damaged, batch_size):
    text, cut, absent = damaged
    given = [text, *images[6:], cut, *images[5:2:-1], absent, *images[:3], images[7]]
    lines = predictions(*given, "--batch-size", str(batch_size))
    assert [line["image"] for line in lines] == given[:-1]  # the last is there already
    assert [line["image"] for line in lines if "error" in line] == list(damaged)
    readable = [line for line in lines if "error" not in line]
    expected = by_hand(run, [line["image"] for line in readable])
    np.testing.assert_allclose(table(readable), expected, rtol=1e-4, atol=1e-7)


def test_a_batch_is_predicted_before_the_last_image_is_read(run, tmp_path):
    files = [picture(tmp_path / f"{i}.png", seed=i) for i in range(20)]
    given = predict.predict(load(run, device="cpu"), files, HERE, batch_size=2)
    first = next(given)
    assert [prediction.image for prediction in first] == files[:2]
    os.remove(files[-1])
    rest = [prediction for batch in given for prediction in batch]
    assert [prediction.image for prediction in rest] == files[2:]
    assert [prediction.error for prediction in rest] == [None] * 17 + ["cannot be read (No such file or directory)"]


def test_every_kind_of_checkpoint(predictions, run, images, tmp_path):
    """The formats of timm and facebookresearch/deit know no names of classes."""
    expected = by_hand(run, images)
    np.testing.assert_allclose(table(predictions(*images, source=run / "last")), expected, rtol=1e-4)
    state = load_file(run / "last" / "model.safetensors")
    torch.save({"model": state}, tmp_path / "model.pth")
    lines = predictions(*images, "--model", MODEL, source=tmp_path / "model.pth")
    np.testing.assert_allclose(table(lines, ("0", "1", "2")), expected, rtol=1e-4)


def test_imagenets_classes_have_their_names(predictions, images, tmp_path):
    torch.manual_seed(0)
    state = create_model(MODEL, num_classes=1000).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    source = tmp_path / "model.safetensors"
    (line,) = predictions(images[0], "--top", "2000", "--model", MODEL, source=source)
    names = load(source, device="cpu", name=MODEL).class_names
    assert len(line["classes"]) == 1000 and names[0] == "tench, Tinca tinca"
    assert {prediction["class"] for prediction in line["classes"]} == set(names)


# ---------------------------------------------------------------------------------------------------------------------
# Forms


def test_plain_lines(ask, run, images):
    code, out, err = ask(*images, "--top", "2")
    assert (code, err) == (0, "")
    for line, image, row in zip(out.splitlines(), images, by_hand(run, images), strict=True):
        (first, second) = re.findall(r"  (\w+) +([\d.]+) %", line.removeprefix(image))
        order = row.argsort()[::-1]
        assert [first[0], second[0]] == [list(COLORS)[i] for i in order[:2]]
        assert [float(first[1]), float(second[1])] == pytest.approx((100 * row[order[:2]]).tolist(), abs=0.051)
    assert len({line.index(" %") for line in out.splitlines()}) == 1  # in columns


def test_a_name_of_several_lines_is_one_line():
    line = as_line(["a.png"], ["cat"])(Prediction("a\nb\r.png", [("cat", 1.0)]))
    assert line.startswith("a\\nb\\r.png  cat")


def test_csv(ask, run, images, damaged):
    code, out, _ = ask(*images, *damaged, "--csv", "--top", "7")
    assert code == 0 and "\r" not in out
    header, *rows = csv.reader(io.StringIO(out))
    assert header == ["image", *(f"{kind}_{i}" for i in (1, 2, 3) for kind in ("class", "probability"))]
    assert [row[0] for row in rows] == images  # and none for what cannot be read
    for row, expected in zip(rows, by_hand(run, images)):
        order = expected.argsort()[::-1]
        assert row[1::2] == [list(COLORS)[i] for i in order]
        np.testing.assert_allclose(np.array(row[2::2], float), expected[order], rtol=1e-4)


def test_names_that_need_quotes_or_are_not_utf8(ask, predictions, images, tmp_path):
    odd = [str(tmp_path / name) for name in ('a, "b".png', os.fsdecode(b"\xff.png"), "[bold]:smile:.png")]
    for name in odd:
        shutil.copy(images[0], name)
    assert [line["image"] for line in predictions(*odd)] == odd
    code, out, _ = ask(*odd, "--csv")
    assert code == 0
    names = [row[0] for row in csv.reader(io.StringIO(out))]
    assert names[1] == odd[0] and names[3] == odd[2] and len(names) == 4
    code, out, _ = ask(*odd)
    assert code == 0 and len(out.splitlines()) == 3
    (tmp_path / "[bold]:smile:.png").write_text("broken")
    assert f"{odd[2]}: not an image" in ask(*odd)[2]


def test_the_bytes_of_a_name_come_out_as_they_are(run, images, tmp_path, monkeypatch):
    name = os.fsdecode(bytes(tmp_path) + b"/\xff.png")
    shutil.copy(images[0], name)
    with open(tmp_path / "out", "w", encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "argv", ["predict", str(run), name, "--device", "cpu"])
        predict.main()
    assert (tmp_path / "out").read_bytes().startswith(os.fsencode(name) + b"  ")


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


@pytest.mark.parametrize("stdout", ["file", "pipe", "terminal"])
def test_a_bar_where_it_is_not_in_the_way(run, images, damaged, tmp_path, monkeypatch, stdout):
    """A pipe's reader, `head` say, may write to the terminal that the bar is on."""
    file = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    reader, writer = {"file": lambda: (file, file), "pipe": os.pipe, "terminal": os.openpty}[stdout]()
    with os.fdopen(writer, "w", closefd=False) as out, open(tmp_path / "err", "wb") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", Terminal(err))
        monkeypatch.setattr(sys, "argv", ["predict", str(run), *images, *damaged, "--csv", "--device", "cpu"])
        predict.main()
        sys.stdout.flush(), sys.stderr.flush()
    told = (tmp_path / "err").read_text()
    assert ("predicting" in told) == (stdout == "file")
    for name, cause in damaged.items():
        assert re.search(f"{re.escape(name)}: .*{cause}", told)
    if stdout == "file":
        os.lseek(reader, 0, os.SEEK_SET)
    answered = os.read(reader, 1 << 16).decode()
    assert [row[0] for row in csv.reader(io.StringIO(answered))] == ["image", *images]
    for descriptor in {file, reader, writer}:
        os.close(descriptor)


def test_the_plain_form_gives_way_to_the_terminals_width():
    prediction = Prediction("a.png", [("cat", 0.5), ("dog", 0.25), ("a long name", 0.125)])
    lines = {width: as_line(["a.png"], ["cat", "dog"], width)(prediction) for width in (None, 10, 31, 52)}
    assert lines[10] == "a.png  cat  50.0 %" and lines[31] == "a.png  cat  50.0 %  dog  25.0 %"
    assert lines[52] == lines[None] == "a.png  cat  50.0 %  dog  25.0 %  a long name  12.5 %"


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be read, and other endings


def test_what_cannot_be_read_is_told_and_the_rest_goes_on(ask, predictions, images, damaged):
    code, out, err = ask(*damaged, images[0])
    assert code == 0 and len(out.splitlines()) == 1 and out.startswith(images[0])
    lines = [line for line in err.splitlines() if "[ERROR]" not in line]  # DALI says something too
    assert len(lines) == len(damaged)
    for line, (name, cause) in zip(lines, damaged.items()):
        assert line.startswith(f"{name}: ") and cause in line
    errors = [line for line in predictions(*damaged, images[0]) if "error" in line]
    assert [line.keys() for line in errors] == [{"image", "error"}] * len(damaged)
    assert [f"{line['image']}: {line['error']}" for line in errors] == lines


def test_a_header_that_crashes_the_decoder_among_a_hundred_images(ask, tmp_path):
    """A JPEG of 136 bits a sample and a BMP of 16 bits: DALI's decoder raises on them in one of its threads."""
    good = [picture(tmp_path / f"{i:03d}.jpg", seed=i) for i in range(100)]
    jpeg, bmp = open(good[0], "rb").read(), open(picture(tmp_path / "50_deep.bmp", seed=0), "rb").read()
    frame = jpeg.index(b"\xff\xc0")
    (tmp_path / "30_deep.jpg").write_bytes(jpeg[: frame + 4] + b"\x88" + jpeg[frame + 5 :])
    (tmp_path / "50_deep.bmp").write_bytes(bmp[:28] + b"\x10" + bmp[29:])
    _, out, _ = ask(tmp_path, "--batch-size", "64", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    errors = {os.path.basename(line["image"]): line["error"] for line in lines if "error" in line}
    assert len(lines) == 102 and set(errors) == {"30_deep.jpg", "50_deep.bmp"}
    assert "JPEG of 136 bits a sample" in errors["30_deep.jpg"]
    assert "BMP of 16 bits a pixel" in errors["50_deep.bmp"]


@pytest.mark.parametrize("batch_size", [1, 64])
def test_nothing_that_can_be_read(ask, damaged, tmp_path, batch_size):
    (text, cut, absent) = damaged
    more = [shutil.copy(cut, tmp_path / f"{i}.png") for i in range(3)]
    for some in ([text], [absent], [cut], [text, absent], [text, cut, absent, *map(str, more)]):
        code, out, err = ask(*some, "--json", "--batch-size", str(batch_size))
        assert code == 2 and err.splitlines()[-1] == "error: no image could be read"
        assert [json.loads(line)["image"] for line in out.splitlines()] == some
        assert all(f"{name}: " in err for name in some)


def test_a_reader_that_has_enough(run, images, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        monkeypatch.setattr(sys, "argv", ["predict", str(run), *images, "--batch-size", "1", "--device", "cpu"])
        with pytest.raises(SystemExit) as stop:
            errors.run(predict.main)
    assert not stop.value.code


@pytest.mark.parametrize(
    "options, words",
    [
        ("--top 0", ["--top 0"]),
        ("--json --csv", ["--json", "--csv"]),
        ("--batch-size 0", ["--batch-size 0"]),
        ("--input-size 15", ["15", "patches of 4"]),
        ("--device tpu7", ["tpu7", "cpu"]),
        ("--eval-crop-ratio 2", ["2.0"]),
    ],
)
def test_bad_settings(cli, run, images, options, words):
    refused(cli, predict.main, run, images[0], *options.split(), words=words)


def test_what_the_model_has_not(cli, images, tmp_path):
    save_file(create_model("deit_nano_patch4_16", num_classes=3).state_dict(), tmp_path / "plain.safetensors")
    source = (tmp_path / "plain.safetensors", "--model", "deit_nano_patch4_16", images[0], "--device", "cpu")
    refused(cli, predict.main, *source, "--head", "dist", words=["no distillation head"])
    refused(cli, predict.main, *source, "--ema", words=["plain.safetensors", "no moving average", "--ema"])
    code, out, _ = cli(predict.main, *source)
    assert code == 0 and out.startswith(images[0])


def test_no_checkpoint(cli, images, tmp_path):
    refused(cli, predict.main, tmp_path / "none", images[0], words=["no checkpoint", "none"])
    refused(cli, predict.main, "resnet_50", images[0], words=["no checkpoint resnet_50", "did you mean"])


def test_several_processes(cli, run, images, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(cli, predict.main, run, images[0], words=["torchrun"])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of the attention


def test_pictures_of_the_attention(ask, images, damaged, tmp_path):
    one = picture(tmp_path / "in/a/x.png", seed=0, height=20, width=30)
    picture(tmp_path / "in/b/x.png", seed=1, height=20, width=30)
    shutil.copy(images[0], tmp_path / "in/a/x.jpg")
    code, _, err = ask(tmp_path / "in", *damaged, "--attention", tmp_path / "maps")
    assert code == 0, err
    pictures = sorted(path for path in (tmp_path / "maps").rglob("*") if path.is_file())
    assert len(pictures) == 3
    assert [path.parts[-2:] for path in pictures] == [("a", "x.jpg.png"), ("a", "x.png.png"), ("b", "x.png")]
    contents = []
    for path in pictures:
        with Image.open(path) as drawn:
            assert drawn.width > 3 * drawn.height > 600
            contents.append(np.asarray(drawn.convert("RGB")))
    assert len({content.tobytes() for content in contents}) == 3
    code, _, _ = ask(one, "--attention", tmp_path / "flat")
    assert code == 0 and [path.name for path in (tmp_path / "flat").iterdir()] == ["x.png"]


def test_where_attention_cannot_be_drawn(cli, run, images, tmp_path):
    import timm

    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "vit.safetensors")
    source = (tmp_path / "vit.safetensors", "--model", "test_vit")
    refused(
        cli, predict.main, *source, images[0], "--attention", tmp_path / "maps", words=["VisionTransformer", "DeiT"]
    )
    assert not (tmp_path / "maps").exists()
    (tmp_path / "file").touch()
    refused(cli, predict.main, run, images[0], "--attention", tmp_path / "file", words=["file", "another folder"])
    refused(cli, predict.main, run, images[0], "--attention", tmp_path / "file/x", words=["file/x"])
    one = picture(tmp_path / "in" / "x.png", seed=0)
    other = picture(tmp_path / "in" / "x.png.png", seed=1)
    before = open(other, "rb").read()
    refused(cli, predict.main, run, one, other, "--attention", tmp_path / "in", words=["in/x.png", "another folder"])
    assert open(other, "rb").read() == before
