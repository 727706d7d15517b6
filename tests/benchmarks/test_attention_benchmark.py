"""The attention benchmark runs without a GPU, says what it could not measure, and times no peer that is wrong."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("attention")
    for name in ("attention", "harness"):
        sys.modules.pop(name, None)


def test_command_runs_on_the_cpu():
    flags = "--device cpu --batch 2 --tokens 198 --heads 3 --seconds 0.05 --no-record --peers".split()
    command = [sys.executable, str(BENCHMARKS / "attention.py"), *flags, "sdpa flash", "sdpa cudnn"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for operation in ("attention_qkvpacked", "attention"):
        for direction in ("forward", "backward"):
            assert f"{operation}, {direction}, 2 x 198 x 3 x 64 float32\n" in output
    lines = [line.split() for line in output.splitlines() if line.startswith("    ")]
    assert sum(line[0] == "fastdeit" and float(line[1]) > 0 for line in lines) == 4
    assert sum(line[:2] == ["sdpa", "flash"] and float(line[2]) > 0 for line in lines) == 4
    assert sum(line[:3] == ["sdpa", "cudnn", "n/a"] for line in lines) == 4


def test_record_holds_what_was_measured_and_names_the_rest(benchmark, tmp_path, monkeypatch):
    def wrong(q, k, v):
        return 1.01 * torch.nn.functional.scaled_dot_product_attention(q, k, v)  # heads and tokens mistaken, too

    def nan(q, k, v):
        return q * k * v * float("nan")

    monkeypatch.setitem(benchmark.PEERS, "wrong", lambda: wrong)
    monkeypatch.setitem(benchmark.PEERS, "nan", lambda: nan)
    table = benchmark.Table("attention", "cpu")
    table.folder = tmp_path
    benchmark.measure(table, False, (2, 9, 3), torch.float32, 0.01, ["sdpa flash", "wrong", "nan"])
    rows = (tmp_path / "attention.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 and not any("wrong" in row or "nan" in row for row in rows)
    missing = json.loads((tmp_path / "attention.json").read_text())["not measured"]
    assert sum("wrong: ValueError: wrong numbers" in entry for entry in missing) == 2
    assert sum("nan: ValueError: wrong numbers, off by nan" in entry for entry in missing) == 2
    assert (tmp_path / "attention.png").stat().st_size > 1000


def test_ours_must_be_right(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "attention", lambda q, k, v: 0 * q)
    with pytest.raises(ValueError, match="wrong numbers"):
        benchmark.measure(benchmark.Table("x", "cpu", record=False), False, (2, 9, 3), torch.float32, 0.01, [])


def test_gpu_checks_names_files_that_exist(benchmark):
    names = list(importlib.import_module("gpu_checks").BENCHMARKS)
    sys.modules.pop("gpu_checks")
    assert "attention.py" in names and all((BENCHMARKS / name).exists() for name in names)
