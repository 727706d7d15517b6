"""`python -m benchmarks NAME --quick` goes every way of a benchmark without a GPU; full runs say what they need."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import benchmarks.__main__ as command
from benchmarks import gpu_checks, pipeline
from benchmarks.__main__ import BENCHMARKS, KERNELS
from benchmarks.record import NO_TIMING, RECORDS
from fastdeit.config import Config
from fastdeit.kernels.backend import interpreter_lacks

ROOT = Path(__file__).parents[2]


def benchmarks(*arguments, code=0):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.parametrize("name", BENCHMARKS)
def test_quick(name):
    if name in ("pipeline", "epoch"):
        pytest.importorskip("nvidia.dali")
    if name in KERNELS and (lacking := interpreter_lacks()) is not None:
        pytest.skip(lacking)
    before = {path: path.stat().st_mtime_ns for path in RECORDS.rglob("*")}
    output = benchmarks(name, "--quick", "--device", "cpu")
    assert NO_TIMING in output and "done in" in output
    if name in KERNELS:
        assert "fastdeit" in output and " us " not in output
    assert before == {path: path.stat().st_mtime_ns for path in RECORDS.rglob("*")}


def test_tuning_quickly():
    if (lacking := interpreter_lacks()) is not None:
        pytest.skip(lacking)
    command = [sys.executable, "-m", "benchmarks.tune_attention", "--quick", "--device", "cpu"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert output.count("table: ") == 2 and output.count("runs") == 4


def test_kernels_are_not_timed_without_a_gpu():
    output = benchmarks(*KERNELS, "--device", "cpu")
    assert output.count("needs a CUDA device") == len(KERNELS)


def test_unknown_flags_are_refused_by_the_benchmark():
    assert "not run" in benchmarks("teacher", "--device", "cpu", "--quick", "--nonsense", code=2)
    benchmarks("loss", "norm", "--nonsense", code=2)


def test_a_missing_package_ends_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # importing it raises
    monkeypatch.setattr(sys, "argv", ["pipeline", "--quick", "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        pipeline.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "pip install 'fastdeit[train]'" in error


@pytest.mark.parametrize(
    "names, codes, code",
    [("all", {"epoch": 2}, 0), ("epoch norm", {"epoch": 2}, 2), ("all", {"epoch": 2, "loss": 1}, 1)],
)
def test_what_cannot_run_is_told_from_what_fails(names, codes, code, monkeypatch, capsys):
    monkeypatch.setattr(command, "run", lambda name, *_, **__: codes.get(name, 0))
    monkeypatch.setattr(sys, "argv", ["benchmarks", *names.split(), "--quick", "--device", "cpu"])
    assert command.main() == code
    ends = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.partition("\n====\n")[2].splitlines())
    assert ends["epoch"].startswith("not run") and ends["norm"].startswith("done")


def test_the_gpu_checks_know_every_benchmark_and_test(monkeypatch):
    assert set(gpu_checks.BENCHMARKS) == set(BENCHMARKS) and list(gpu_checks.BENCHMARKS)[:4] == list(KERNELS)
    every = [*gpu_checks.program_steps(), *gpu_checks.test_steps(), *gpu_checks.benchmark_steps(list(BENCHMARKS))]
    steps = {step.name: step for step in every}
    assert gpu_checks.NEEDS.keys() <= steps.keys() | {"pipelines"}
    monkeypatch.setitem(gpu_checks.NEEDS, "pipelines", ("torch", "nothing.like.this"))
    assert steps["pipelines/test_gpu_loader"].missing == ["nothing.like.this"]
    assert steps["kernels/test_attention_triton"].missing == [] == steps["fastdeit/test_teacher"].missing


def test_a_step_of_the_gpu_checks_that_fails_costs_itself_only(tmp_path):
    def python(code, minutes=1.0, **more):
        return gpu_checks.Step("step", [sys.executable, "-c", code], minutes, **more)

    console, deadline = gpu_checks.Console(tmp_path / "log"), time.monotonic() + 60
    ends = [
        gpu_checks.run(step, deadline, console, stream=False)[1]
        for step in (
            python("import os; os.kill(os.getpid(), 11)"), python("import time; time.sleep(60)", minutes=5 / 60),
            python("print('a warning')", refused="a warning"), python("print('all is well')", refused="a warning"),
        )
    ]  # fmt: skip
    assert ends == ["FAILED (exit -11)", "stopped after 5 s", "FAILED (a warning)", "passed"]


def test_the_program_steps_of_the_gpu_checks_are_command_lines_that_exist():
    pytest.importorskip("tyro")
    from fastdeit import tune
    from fastdeit.cli import parse_config

    steps = {step.name: step for step in gpu_checks.program_steps()}
    assert list(steps)[:3] == ["doctor", "decoder probe", "tuning"] and gpu_checks.NEEDS.keys() & steps.keys()
    for name, step in steps.items():
        _, flag, module, *arguments = step.command
        assert flag == "-m" and (module == "pytest" or importlib.util.find_spec(module))
        if module in ("fastdeit.train", "fastdeit.tune"):
            config = parse_config(arguments, kind=tune._CommandLine if name == "tuning" else Config)
            assert (config.speed.cuda_graph, config.speed.tune) == {
                "tuning": ("auto", "fresh"), "run by default": ("auto", "auto"),
                "run as one CUDA graph": ("on", "auto"), "run as written": ("off", "off"),
            }[name]  # fmt: skip
    assert parse_config(steps["run as written"].command[3:]).speed.compile is False
    assert (Path(gpu_checks.ROOT) / steps["decoder probe"].command[-1]).is_file()
