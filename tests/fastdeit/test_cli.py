import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass, make_dataclass

import pytest

from fastdeit import cli, errors
from fastdeit.config import setting
from fastdeit.errors import UserError
from fastdeit.models.deit import create_model
from fastdeit.pipelines import TooManyBadFiles


def stop(capfd, action):
    with pytest.raises(SystemExit) as exit:
        errors.run(action)
    return exit.value.code, capfd.readouterr().err


def raising(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize("error", [UserError("no such\nfolder"), TooManyBadFiles("no such folder")])
def test_our_errors_are_one_sentence(capfd, error):
    assert stop(capfd, raising(error)) == (2, "error: no such folder\n")


def test_a_value_error_of_ours_is_one_sentence(capfd):
    code, err = stop(capfd, lambda: create_model("deit_nano_patch4_16", img_size=15))
    assert code == 2 and err.startswith("error: images of 15 x 15") and err.count("\n") == 1


def test_a_missing_package_is_named_with_the_pip_line(capfd):
    code, err = stop(capfd, raising(ModuleNotFoundError("No module named 'timm'", name="timm.models")))
    assert (code, err) == (2, "error: timm.models is not installed: pip install 'fastdeit[train]' brings it\n")


def test_a_place_that_may_not_be_written_to_is_named(capfd):
    code, err = stop(capfd, raising(PermissionError(errno.EACCES, "Permission denied", "/runs/x")))
    assert (
        code == 2 and err.startswith("error: /runs/x: Permission denied; choose another path") and err.count("\n") == 1
    )


def test_a_full_gpu_is_told_what_takes_less(capfd):
    import torch

    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139 GiB of which 1 is free."
    code, err = stop(capfd, raising(torch.OutOfMemoryError(text)))
    assert code == 2 and err.count("\n") == 1 and "(CUDA out of memory. Tried to allocate 2.00 GiB): lower" in err
    assert all(flag in err for flag in ("--batch-size", "--accumulate", "--grad-checkpointing"))


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ModuleNotFoundError("x", name="left_pad")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        errors.run(raising(error))


def test_a_value_error_of_another_package_is_a_bug():
    with pytest.raises(ValueError):
        errors.run(lambda: json.loads("{"))


def test_the_traceback_on_request(monkeypatch):
    monkeypatch.setenv("FASTDEIT_TRACEBACK", "1")
    with pytest.raises(UserError):
        errors.run(raising(UserError("x")))


@dataclass
class Some:
    """Settings."""

    size: int = setting(3, at_least=1)
    """Of the thing, in metres; what is longer than a line goes on
    --below, and stays one paragraph."""
    name: str | None = None
    """Of the thing. Default: none."""


def help_of(monkeypatch, capsys, columns):
    pytest.importorskip("tyro")
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        cli.parse(Some, prog="some", args=["--help"], description=f"One.\n\n    some --size 4\n\n{'two ' * 40}")
    return capsys.readouterr().out


def test_help_is_in_paragraphs(monkeypatch, capsys):
    out = help_of(monkeypatch, capsys, 200)
    assert (
        "Of the thing, in metres; what is longer than a line goes on --below, and stays one paragraph. (default: 3)"
        in out
    )
    assert "\nOne.\n\n    some --size 4\n\ntwo two" in out


def test_a_value_out_of_its_bounds_is_refused_by_any_command():
    pytest.importorskip("tyro")
    assert cli.parse(Some, description="", args=["--size", "1"]).size == 1
    with pytest.raises(UserError, match=r"^--size 0: must be at least 1$"):
        cli.parse(Some, description="", args=["--size", "0"])


def test_settings_without_their_source():
    pytest.importorskip("tyro")
    made = make_dataclass("Made", [("size", int, 3)])
    assert cli.parse(made, args=["--size", "4"], description="").size == 4


@pytest.mark.parametrize("columns", [60, 100])
def test_help_fits_the_terminal(monkeypatch, capsys, columns):
    assert max(map(len, help_of(monkeypatch, capsys, columns).splitlines())) <= columns


@pytest.mark.parametrize("arguments", [["--help"], ["--print-config"]])
def test_what_is_said_may_be_read_in_part(arguments):
    pytest.importorskip("tyro")
    read, write = os.pipe()
    os.close(read)
    command_line = [sys.executable, "-m", "fastdeit.train", *arguments]
    done = subprocess.run(command_line, stdout=write, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_exit_code_of_main(capfd):
    assert stop(capfd, lambda: None)[0] in (0, None)
    assert stop(capfd, lambda: 3)[0] == 3


@pytest.mark.parametrize(
    "flags, value",
    [
        ([], None), (["--compile"], True), (["--no-compile"], False), (["--compile", "True"], True),
        (["--compile", "False"], False), (["--compile=None"], None), (["--no_compile"], False),
        (["--compile", "--no-compile"], False), (["--no-compile", "--seed", "1", "--compile"], True),
    ],
)  # fmt: skip
def test_a_setting_that_may_be_none_is_switched_as_others_are(flags, value):
    pytest.importorskip("tyro")
    config = cli.parse_config(["--data-path", "x", *flags])
    assert config.speed.compile is value and ("--compile" in config.typed) == bool(flags)


TINY, SMALL = "deit_tiny_patch16_224", "deit_small_patch16_224"


@pytest.mark.parametrize(
    "line, on_a_cpu, recipe",
    [
        ("--data-path x", TINY, "deit_tiny"),
        ("--data-path x --distillation-type hard --teacher-model resnet50", TINY, "deit_tiny"),
        ("--data-path x --recipe finetune", TINY, "finetune"),
        ("--data-path x --recipe deit_small", SMALL, "deit_small"),
        ("--data-path x --recipe finetune --model deit_small_patch16_224", SMALL, "finetune"),
        ("--data-path x --model deit_small_patch16_224", SMALL, "deit_small"),
        ("--data-path x --model deit_base_patch16_224", "deit_base_patch16_224", "deit_small"),
    ],
)
def test_a_smaller_model_without_a_gpu_unless_one_was_named(monkeypatch, capsys, line, on_a_cpu, recipe):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = cli.parse_config(line.split())
    assert (config.model.model, config.run.recipe) == (on_a_cpu, recipe)
    assert ("no GPU: the model is deit_tiny_patch16_224" in capsys.readouterr().err) == (on_a_cpu == TINY)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with_gpu = cli.parse_config(line.split())
    assert with_gpu.model.model == on_a_cpu.replace("tiny", "small") and capsys.readouterr().err == ""
    assert cli.parse_config([*line.split(), "--device", "cpu"]).model.model == on_a_cpu
