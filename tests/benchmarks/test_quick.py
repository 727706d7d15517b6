"""`python -m benchmarks NAME --quick` goes every way of a benchmark without a GPU; full runs say what they need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_checks
from benchmarks.__main__ import BENCHMARKS, KERNELS
from benchmarks.record import NO_TIMING, RECORDS

ROOT = Path(__file__).parents[2]


def benchmarks(*arguments, code=0):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.parametrize("name", BENCHMARKS)
def test_quick(name):
    before = {path: path.stat().st_mtime_ns for path in RECORDS.rglob("*")}
    output = benchmarks(name, "--quick", "--device", "cpu")
    assert NO_TIMING in output and "done in" in output
    if name in KERNELS:
        assert "fastdeit" in output and " us " not in output
    assert before == {path: path.stat().st_mtime_ns for path in RECORDS.rglob("*")}


def test_tuning_quickly():
    command = [sys.executable, "-m", "benchmarks.tune_attention", "--quick", "--device", "cpu"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert output.count("table: ") == 2 and output.count("runs") == 4


def test_kernels_are_not_timed_without_a_gpu():
    output = benchmarks(*KERNELS, "--device", "cpu")
    assert output.count("needs a CUDA device") == len(KERNELS)


def test_unknown_flags_are_refused_by_the_benchmark():
    assert "FAILED (exit 2)" in benchmarks("loss", "--device", "cpu", "--quick", "--nonsense", code=1)
    benchmarks("loss", "norm", "--nonsense", code=2)


def test_the_gpu_checks_know_every_benchmark_and_test(monkeypatch):
    assert set(gpu_checks.BENCHMARKS) == set(BENCHMARKS) and list(gpu_checks.BENCHMARKS)[:4] == list(KERNELS)
    monkeypatch.setattr(gpu_checks, "NEEDS", {"pipelines": "nothing.like.this"})
    steps = {step.name: step.needs for step in gpu_checks.test_steps()}
    assert steps["kernels/test_attention_triton"] is None and steps["fastdeit/test_resume"] is None
    assert steps["pipelines/test_gpu_loader"] == "nothing.like.this"
