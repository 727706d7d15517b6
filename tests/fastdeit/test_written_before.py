"""Runs, checkpoints and logit caches that an earlier version wrote still load, and mean what they meant.

files/written_2026_11.tar.xz was written by commit eac9b7b: `data` (three colours), `runs/teacher` (finished),
`runs/student` (stopped at step 4 of 6) and `store`, the teacher's hard labels for three epochs. The weights were then
replaced by a short repeating pattern, so that the file is small. The values below are what that commit printed.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch

from fastdeit import predict

from .runs import run

ARCHIVE = Path(__file__).parent / "files" / "written_2026_11.tar.xz"


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """The archive's content, in a folder of its own and the current one: the paths in its settings are relative."""
    pytest.importorskip("nvidia.dali")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ("runs/student", [], {"blue": 0.462755, "green": 0.283437, "red": 0.253808}),
        ("runs/teacher", [], {"blue": 0.348054, "green": 0.241633, "red": 0.410314}),
    ],
)
def test_checkpoints_predict_what_they_predicted(earlier, cli, source, options, expected):
    code, out, _ = cli(predict.main, source, "data/val/blue/0.png", "--json", *options)
    found = {entry["class"]: entry["probability"] for entry in json.loads(out)["classes"]}
    assert code == 0 and found == pytest.approx(expected, abs=2e-4)


def test_an_interrupted_run_resumes_with_its_logit_cache(earlier):
    written_with = json.loads(Path("store/header.json").read_text())["pixels"]["torch"]
    if written_with != torch.__version__.partition("+")[0]:
        pytest.skip(f"a logit cache is of the pixels of one version of PyTorch, here {written_with}")
    summary = run("--resume", "runs/student")
    assert set(summary) == {"cls", "dist", "both"}
    lines = [json.loads(line) for line in Path("runs/student/metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "train"][-1]
    assert last["step"] == 6
    # One step's loss is of the saved weights themselves, the other's of weights one small step further.
    assert last["class_loss"] == pytest.approx(0.949, rel=0.02)
    assert last["teacher_loss"] == pytest.approx(1.162, rel=0.02)
