"""The page about a run, read back: its numbers are those of the run's files, and nothing in it comes from elsewhere."""

import json
import shlex
import shutil
import statistics
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file

from fastdeit import report, teach, train
from fastdeit.cli import parse_config
from fastdeit.distributed.world import join
from fastdeit.errors import UserError
from fastdeit.evaluation import charts
from fastdeit.report import pictures
from fastdeit.report.page import duration
from fastdeit.report.record import Record
from fastdeit.report.settings import command, differences, recipe_settings

from .conftest import SMALL, write_folder
from .runs import RANDOM, run_until
from .test_charts import read as curves_in

pytest.importorskip("tyro")
pytest.importorskip("nvidia.dali")

# Folders may be called like this, and a page must not care.
CLASSES = {"<script>": (40, 60, 200), '"><img src=x onerror=y>': (50, 180, 60), "tom & jerry": (210, 50, 40)}
EMPTY = {"img", "meta", "br"}


class Page(HTMLParser):
    """elements: (name, attributes, text) in order; tables: rows of cells' texts; text: all of it. Refuses what is not
    nested."""

    def __init__(self, content: str):
        super().__init__()
        self.elements, self.open, self.tables = [], [], []
        self.feed(content)
        self.close()
        assert not self.open, self.open
        self.text = " ".join(self.elements[0].text.split())

    def handle_starttag(self, name, attributes):
        element = SimpleNamespace(name=name, attributes=dict(attributes), text="")
        self.elements.append(element)
        if name not in EMPTY:
            self.open.append(element)
        if name == "table":
            self.tables.append([])
        elif name == "tr":
            self.tables[-1].append([])
        elif name in ("td", "th"):
            self.tables[-1][-1].append(element)

    def handle_endtag(self, name):
        assert self.open.pop().name == name

    def handle_data(self, data):
        if not any(element.name == "style" for element in self.open):
            for element in self.open:
                element.text += data

    def all(self, name, class_=None):
        return [e for e in self.elements if e.name == name and class_ in (None, e.attributes.get("class"))]

    def rows(self, first):
        """The rows below the table's head whose first cell begins with `first`, as texts."""
        table = next(t for t in self.tables if t and t[0] and t[0][0].text.startswith(first))
        return [[cell.text for cell in row] for row in table[1:]]

    def charts(self):
        """{title: what is told of it}"""
        told = [e.attributes["aria-label"] for e in self.all("svg")]
        return {label.split(":")[0]: label for label in told}

    def headline(self):
        names, numbers = self.all("dt"), self.all("dd")
        return {name.text: number.text.removesuffix(" %") for name, number in zip(names, numbers)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), colors=CLASSES)


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A finished run of a student that is no DeiT, without distillation."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    teach.fit([
        *"--model test_resnet --no-pretrained --input-size 32 --batch-size 12 --epochs 1 --warmup-epochs 0".split(),
        *"--num-workers 1 --tracker none --device cpu".split(),
        "--data-path", str(data), "--output-dir", str(folder),
    ])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run(data, teacher):
    """A finished run with all there is: teacher, distillation token, moving average, comparison."""
    folder = teacher.parent / "student"
    config = parse_config([
        *SMALL, "--data-path", str(data), "--output-dir", str(folder), "--distillation-type", "hard", "--teacher-path",
        str(teacher), "--compare-undistilled", "--tracker", "none", "--device", "cpu", "--lr", "1e-3",
    ])  # fmt: skip
    with join("cpu") as place:
        train.train(config, place)
    return folder


@pytest.fixture(scope="module")
def page(run):
    return read(report.write(run, run.parent / "student.html"))


@pytest.fixture
def no_charts(monkeypatch):
    monkeypatch.setattr(charts, "svg", lambda chart: "<svg></svg>")


@pytest.fixture
def copy(run, tmp_path, no_charts):
    """The run, to be damaged; its data seems to be gone, so that no time goes into pictures."""
    folder = shutil.copytree(run, tmp_path / "copy", symlinks=True)
    settings = json.loads((folder / "settings.json").read_text())
    settings["data"]["data_path"] = "synthetic"
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def read(file):
    return Page(file.read_text())


def lines(folder, kind):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


# ---------------------------------------------------------------------------------------------------------------------
# What a finished run's page says


def test_the_head(page, run):
    summary = json.loads((run / "summary.json").read_text())
    names = {"top-1, both heads": "both", "class head": "cls", "distillation head": "dist", "teacher": "teacher",
             "not distilled": "undistilled"}  # fmt: skip
    shown = page.headline()
    assert {names[name]: shown[name] for name in names} == {key: f"{100 * top1:.2f}" for key, top1 in summary.items()}
    speed = statistics.median(line["images_per_s"] for line in lines(run, "train"))
    assert float(shown["images/s, median"].replace(",", "")) == pytest.approx(speed, abs=0.51)
    assert (
        "Finished" in page.text
        and "after 6 steps" in page.text
        and "2 epochs of 3 steps, 12 images a step" in page.text
    )
    parameters = sum(weight.numel() for weight in load_file(run / "last" / "model.safetensors").values())
    assert f"{parameters / 1e6:.2f} M parameters" in page.text
    assert "3 classes" in page.text and "12 validation images" in page.text


def test_accuracies(page, run):
    saved = json.loads((run / "last" / "config.json").read_text())["accuracy"]
    rows = page.rows("after epoch 2")
    shown = [row for row in rows if len(row) == 7]
    heads = [(source, head) for source in ("model", "ema") for head in ("cls", "dist", "both")]
    for (source, head), row in zip(heads, shown):
        value = saved[source][head]
        best = max(lines(run, "eval"), key=lambda line: line[source][head])
        assert row[1:5] == [
            f"{100 * value['top1']:.2f}", f"{100 * value['top5']:.2f}", f"{value['loss']:.4f}",
            f"{100 * value['ece']:.2f}",
        ]  # fmt: skip
        assert row[5:] == [f"{100 * best[source][head]:.2f}", str(best["epoch"] + 1)]
    summary = json.loads((run / "summary.json").read_text())
    assert [row[1] for row in shown[6:]] == [f"{100 * summary[key]:.2f}" for key in ("undistilled", "teacher")]


def test_curves(page, run):
    told = page.charts()
    assert {"Training loss", "Validation top-1", "Learning rate", "Throughput"} < told.keys()
    training = lines(run, "train")
    for name, key in (("loss", "loss"), ("class term", "class_loss"), ("teacher term", "teacher_loss")):
        assert f"{name} from {training[0][key]:.4g} to {training[-1][key]:.4g}" in told["Training loss"]
    for words in (
        "distillation head from",
        "both heads, averaged, moving average from",
        "not distilled from",
        "teacher from",
    ):
        assert words in told["Validation top-1"]
    curve = curves_in((run.parent / "student.html").read_text().split("<svg")[1])["c3", False]
    assert curve == pytest.approx(np.array([(line["step"], line["loss"]) for line in training]), rel=2e-3)
    names = {e.text for e in page.all("li")}
    assert names == {
        "loss", "class term", "teacher term", "class head", "distillation head", "both heads, averaged",
        "not distilled", "teacher", "moving average",
    }  # fmt: skip


def test_where_the_time_went(page, run):
    phases = Record.read(run).phases
    for phase in ("data", "prepare", "teacher", "forward", "loss", "backward", "optimizer"):
        assert (
            phases[phase] == pytest.approx(sum(line["seconds"][phase] for line in lines(run, "train")))
            and phases[phase]
        )
    assert phases["evaluation"] == pytest.approx(sum(line["seconds"]["evaluation"] for line in lines(run, "eval")))
    times = [line["time"] for line in lines(run, "train") + lines(run, "eval")]
    first = sum(lines(run, "train")[0]["seconds"].values())
    assert sum(phases.values()) == pytest.approx(max(times) - min(times) + first, abs=0.05)
    *rows, (_, seconds, share, per_step) = page.rows("phase")
    assert sum(float(row[2]) for row in rows) == pytest.approx(100, abs=0.05 * len(rows)) and share == "100.0"
    assert float(seconds) == pytest.approx(sum(phases.values()), abs=0.051)
    assert float(per_step.replace(",", "")) == pytest.approx(1000 * sum(phases.values()) / 6, abs=0.01)
    widths = [float(e.attributes["style"].split("flex-grow:")[1]) for e in page.all("span") if "style" in e.attributes]
    assert sum(widths) == pytest.approx(sum(phases.values()), abs=1e-3) and len(widths) == len(rows)


def test_pictures(page, run):
    pictures = page.all("img")
    assert all(e.attributes["alt"] for e in pictures)
    assert len(pictures) == 1 + 8 * 5  # the first batch; 8 images, each with last block and rollout of two tokens
    answers = next(rows for rows in page.tables if len(rows) == 6)[-1][1:]
    assert len(answers) == 8 and all(any(name in cell.text for name in CLASSES) for cell in answers)
    told = page.charts()["Class and distillation token"].removeprefix(
        "Class and distillation token: cosine similarity "
    )
    assert len([float(value) for value in told.split(", ")]) == 7  # at the input and after six blocks


def test_a_wrong_prediction_stands_before_the_class(copy, monkeypatch):
    look = pictures.Look("cat.png", "data:,", ["data:,"], true="tabby", predicted="tiger", probability=0.64)
    monkeypatch.setattr(pictures, "look", lambda *_: pictures.Looks(["last block"], [look], [], images=400))
    page = read(report.write(copy))
    assert "tiger 64 %is tabby" in page.text and "400 validation images" in page.text
    assert "One validation image is 0.25 %" in page.text


def test_nothing_is_loaded_and_names_are_only_text(page):
    for element in page.elements:
        assert element.name not in ("script", "link", "iframe", "object"), element
        for name in ("src", "href", "srcset", "data", "poster", "action", "xlink:href", "background"):
            assert element.attributes.get(name, "data:").startswith(("data:", "#")), element.attributes
        assert "url(" not in element.attributes.get("style", "") and "onerror" not in element.attributes
    for name in CLASSES:
        assert name in page.text


def test_the_style_loads_nothing(run):
    content = (run.parent / "student.html").read_text()
    style = content[content.index("<style>") : content.index("</style>")]
    assert "prefers-color-scheme: dark" in style and "url(" not in style and "@import" not in style


def test_settings_and_the_command(page, run):
    settings = json.loads((run / "settings.json").read_text())
    recipe = recipe_settings(settings)
    changed = differences(settings, recipe)
    assert changed["optimization", "epochs"] == 30 and ("optimization", "opt") not in changed
    words = shlex.split(command(settings, changed, 1).replace("\\\n", ""))
    assert words[:3] == ["python", "-m", "fastdeit.train"]
    assert parse_config(words[3:]).to_dict() == settings
    rows = {row[0]: row[1:] for row in page.rows("setting") if len(row) == 3}
    assert rows["epochs"] == ["2", "30"] and rows["opt"] == ["adamw", ""]
    assert len(rows) == sum(len(group) for group in settings.values())


# ---------------------------------------------------------------------------------------------------------------------
# Runs that lack something


def test_a_run_without_distillation_of_another_model(teacher, tmp_path):
    page = read(report.write(teacher, tmp_path / "page.html"))
    assert page.headline().keys() >= {"top-1"} and "Teacher" not in page.headline()
    assert "Not drawn: test_resnet has no class token" in page.text
    assert "teacher" not in [row[0] for row in page.rows("phase")]
    assert "term" not in page.charts()["Training loss"]


def test_a_run_that_was_stopped(monkeypatch, no_charts, data, tmp_path):
    folder = tmp_path / "stopped"
    run_until(monkeypatch, 4, *RANDOM, "--data-path", data, "--output-dir", folder)
    page = read(report.write(folder))
    assert "Not finished: step 5 of 9 (56 %)" in page.text and f"--resume {folder}" in page.text
    assert page.rows("after epoch 1")[1][0] == "class head"
    assert "first_batch.png is not in the folder" in page.text
    assert len(page.all("img")) == 8 * 5


def test_a_checkpoint_of_an_earlier_evaluation_than_the_last(copy):
    records = lines(copy, "train") + lines(copy, "eval")
    records[-1]["ema"]["both"] = 0.125
    write_lines(copy / "metrics.jsonl", records)
    rows = read(report.write(copy)).rows("after epoch 2")
    assert [row for row in rows if row[0] == "both heads, averaged"][1][:2] == ["both heads, averaged", "12.50"]
    assert {len(row) for row in rows} == {1, 4}  # top-1 now, the best, its epoch: the log does not know more


def test_a_recipe_that_is_gone(copy):
    settings = json.loads((copy / "settings.json").read_text())
    settings["run"]["recipe"] = "of_another_version"
    settings["data"]["of_another_version"] = 1
    (copy / "settings.json").write_text(json.dumps(settings))
    page = read(report.write(copy))
    assert "Recipeof_another_version" in page.text and not page.all("pre")
    assert ["of_another_version", "1", ""] in page.rows("setting")


def test_a_run_before_its_first_figures(copy):
    for name in ("summary.json", "metrics.jsonl", "last", "best", "first_batch.png"):
        (copy / name).unlink()
    page = read(report.write(copy))
    assert "the log holds no figures yet" in page.text and "Not drawn: there is no checkpoint." in page.text


def test_a_log_cut_off_and_without_times(copy):
    kept = [
        {key: value for key, value in line.items() if key not in ("time", "seconds", "attention_loss")}
        for line in lines(copy, "train") + lines(copy, "eval")
    ]
    write_lines(copy / "metrics.jsonl", kept)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    page = read(report.write(copy))
    assert "The log holds no times." in page.text and "Finished after 6 steps." in page.text


def test_a_pause_is_no_work(copy):
    records = lines(copy, "train") + lines(copy, "eval")
    for record in records:
        record["time"] += 7200 * (record["step"] > 3)
    write_lines(copy / "metrics.jsonl", records)
    before, after = Record.read(copy), read(report.write(copy))
    assert before.standstill == pytest.approx(7200, abs=5) and sum(before.phases.values()) < 600
    assert "2 h 00 min in which the run stood still" in after.text


def test_bad_files_and_steps_that_are_not_finite(copy):
    (copy / "bad_files.txt").write_text("".join(f"/data/<i>{i}.jpg\ttruncated\n" for i in range(21)))
    (copy / "nonfinite.jsonl").write_text(
        '{"step": 4, "skipped": true, "gradient_norm": "nan", "terms": ["loss", "class term"], '
        '"ranks": [{"rank": 0, "losses": ["nan", 1.5], "files": ["a.png"]}]}\n'
    )
    page = read(report.write(copy))
    assert len(page.rows("image")) == 20 and page.rows("image")[3] == ["/data/<i>3.jpg", "truncated"]
    assert page.rows("step") == [["4", "skipped", "nan", "loss nan"]]
    assert "21 images could not be read, the first 20" in page.text


def test_data_that_is_gone(run, copy):
    settings = json.loads((run / "settings.json").read_text())
    settings["data"]["data_path"] = "/nowhere/<at all>"
    (copy / "settings.json").write_text(json.dumps(settings))
    page = read(report.write(copy))
    assert "Not drawn: " in page.text and "/nowhere/<at all>" in page.text
    assert len(page.all("img")) == 2  # the first batch, and the similarity as the training drew it


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command(cli, copy):
    code, out, err = cli(report.main, copy)
    assert code == 0, err
    assert out.startswith(f"{copy / 'report.html'}: ") and (copy / "report.html").stat().st_size < 1.5e6


@pytest.mark.parametrize("folder, words", [("", "no run"), ("copy/undistilled", "comparison run")])
def test_a_folder_that_is_no_run(cli, copy, tmp_path, folder, words):
    code, _, err = cli(report.main, tmp_path / folder)
    assert code == 2 and err.startswith("error: ") and words in err and "settings.json" in err, err


def test_a_file_that_cannot_be_written(copy):
    with pytest.raises(UserError, match="give the name of a file"):
        report.write(copy, copy)
    with pytest.raises(UserError, match="--output"):
        report.write(copy, copy / "settings.json" / "page.html")


def test_damaged_settings(copy):
    (copy / "settings.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        report.write(copy)


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def test_durations():
    assert [duration(s) for s in (3.44, 125, 3599.6, 2 * 3600 + 180, 52 * 3600)] == [
        "3.4 s", "2 min 05 s", "1 h 00 min", "2 h 03 min", "2 d 4 h",
    ]  # fmt: skip
