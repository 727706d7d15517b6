"""python -m fastdeit.doctor: what works is said to work, and what does not costs its own line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali")

from fastdeit import kernels
from fastdeit.doctor import __main__ as doctor
from fastdeit.doctor import checks, machine, page, tries
from fastdeit.doctor.checks import Check
from fastdeit.doctor.operations import OPERATIONS

QUICK = ("kernels", "other attention", "decoders")  # the others take seconds, and have tests of their own


def test_what_works_here_works(monkeypatch, cli):
    """The command as a user gives it, without the slowest sections."""
    every = checks.checks()
    monkeypatch.setattr(checks, "checks", lambda: [one for one in every if one.section in QUICK])
    code, out, _ = cli(doctor.main, "--json")
    said = json.loads(out)
    assert code == 0 and said["versions"]["torch"] == torch.__version__.partition("+")[0]
    outcomes = {one["name"]: one["outcome"] for one in said["checks"]}
    on_gpu = torch.cuda.is_available()
    assert {outcomes[name] for name in (*checks.OPERATIONS, "CPU", "SDPA math")} == {"works"}
    assert on_gpu or {outcomes[name] for name in ("SDPA cudnn", "xformers", "GPU, regions")} == {"skipped"}
    assert set(checks.OPERATIONS) == set(OPERATIONS)


def made(*wanted, **options):
    return checks.results(**{"slow": False, "on_gpu": False, "seconds": 20} | options, wanted=wanted)


def test_a_crash_costs_its_own_line_and_training_decides_the_exit_code(monkeypatch, cli):
    here = "tests.pipelines.in_child"
    wanted = [
        Check("one", "first", f"{here}:variable", ("LANG",)), Check("one", "crashes", f"{here}:crashes"),
        Check("one", "raises", f"{here}:raises"), Check("one", "is not here", f"{here}:is_not_here"),
        Check("one", "last", f"{here}:twice", ("a",)),
    ]  # fmt: skip
    found = made(*wanted)
    assert [(one.outcome, one.detail) for one in found[1:]] == [
        ("fails", "SIGSEGV"), ("fails", "LookupError: no such thing"), ("skipped", "of another kind"),
        ("works", "aa"),
    ]  # fmt: skip
    for needed in (False, True):
        monkeypatch.setattr(checks, "checks", lambda needed=needed: [replace(wanted[1], needed=needed)])
        code, out, _ = cli(doctor.main)
        assert code == needed and "FAILS    SIGSEGV" in out
        assert ("training needs what is broken: crashes" in out) == needed == (page.ALL_WELL not in out)


def test_what_is_missing_is_not_tried_and_its_pip_line_said_once():
    function = "tests.pipelines.in_child:crashes"
    found = made(
        Check("one", "a", function, modules=("absent_one", "json"), install="pip install one", needed=True),
        Check("one", "b", function, modules=("absent_one",), install="pip install one"),
        Check("one", "c", function, modules=("json.absent",), install="pip install two"),
        Check("one", "d", function, modules=("absent_one",), gpu=True),
        Check("one", "e", function, slow=True),
    )  # fmt: skip
    assert [one.outcome for one in found] == ["missing"] * 3 + ["skipped"] * 2
    assert found[0].detail == "absent_one not installed" and found[0].breaks_training
    assert checks.to_install(found) == ["pip install one", "pip install two"]
    shown = page.of_checks(found)
    assert "MISSING  absent_one" in shown and "missing  json.absent" in shown and shown.count("pip install one") == 1
    (tried,) = made(Check("one", "e", "tests.pipelines.in_child:twice", ("a",), slow=True), slow=True)
    assert tried.outcome == "works"


@pytest.mark.parametrize("name, output", [("bias_gelu", 0), ("add_layer_norm", 1)])
def test_a_kernel_that_is_wrong_fails(monkeypatch, name, output):
    """By one per cent, in the precision that is tried."""
    right = getattr(kernels, name)

    def wrong(x, *arguments, **options):
        outputs = right(x, *arguments, **options)
        if x.dtype == torch.float64:
            return outputs
        if isinstance(outputs, tuple):
            return tuple(1.01 * one if place == output else one for place, one in enumerate(outputs))
        return 1.01 * outputs

    monkeypatch.setattr(kernels, name, wrong)
    with pytest.raises(RuntimeError, match=r"disagrees with the reference: float32, relative error 0\.01"):
        tries.kernel(name)


def test_attention_that_is_wrong_or_not_finite_fails(monkeypatch):
    monkeypatch.setattr(tries, "_attend", lambda name: lambda q, k, v: tries._sdpa(q, k, v * 1.001))
    with pytest.raises(RuntimeError, match="disagrees"):
        tries.other_attention("flash")
    monkeypatch.setattr(tries, "_attend", lambda name: lambda q, k, v: tries._sdpa(q, k, v / 0))
    with pytest.raises(RuntimeError, match="inf"):
        tries.other_attention("flash")


def test_a_decoder_unlike_pillow_fails(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tries._like_pillow([pixels, pixels], str(tmp_path))
    with pytest.raises(RuntimeError, match="differs from Pillow's"):
        tries._like_pillow([pixels, pixels[:, ::-1]], str(tmp_path))


def test_trackers_and_exporters_are_tried():
    pytest.importorskip("tensorboard")
    assert tries.tracker("tensorboard") == "starts and writes"
    assert tries.exporter("timm").startswith("read back, largest difference")


def test_the_page_of_the_machine_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    gpu = {"name": "NVIDIA H100", "driver_version": "580.1", "memory.total": "81559 MiB"}
    shown = page.of_machine(machine.facts() | {"GPU": [gpu]})
    assert "NVIDIA H100, 580.1, 81559 MiB" in shown and f"torch {torch.__version__.partition('+')[0]}" in shown
    words = [word for line in shown.splitlines() if len(line) > 80 for word in line.split()]
    assert max(map(len, words), default=0) == 0 or max(map(len, words)) > 40  # only a path is longer than a line


def test_nvidia_smi_is_read_and_may_hang_or_fail(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "NVIDIA H100 80GB HBM3, 580.82.07, 81559 MiB, Default, Disabled"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert machine.gpus() == [
        {
            "name": "NVIDIA H100 80GB HBM3", "driver_version": "580.82.07", "memory.total": "81559 MiB",
            "compute_mode": "Default", "mig.mode.current": "Disabled",
        }
    ]  # fmt: skip
    tool.write_text("#!/bin/sh\necho no devices; exit 6\n")
    assert machine.gpus() == []


def test_a_report_of_a_bug_begins_with_it():
    yaml = pytest.importorskip("yaml")
    form = Path(__file__).parents[2] / ".github" / "ISSUE_TEMPLATE" / "bug.yml"
    first, *_ = yaml.safe_load(form.read_text())["body"]
    assert "python -m fastdeit.doctor" in first["attributes"]["description"] and first["validations"]["required"]


def test_without_nvidia_smi_the_driver_names_the_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "DRIVER", tmp_path)
    assert machine.gpus() == []
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Open Kernel Module for x86_64  580.82.07  Release Build\n"
    )
    (tmp_path / "gpus" / "0000:18:00.0").mkdir(parents=True)
    (tmp_path / "gpus" / "0000:18:00.0" / "information").write_text("Model: \t\t NVIDIA H100\nIRQ: 1\n")
    assert machine.gpus() == [{"name": "NVIDIA H100", "driver_version": "580.82.07"}]


@pytest.mark.gpu
def test_every_kernel_runs_in_triton_on_a_gpu():
    for name in checks.OPERATIONS:
        assert tries.kernel(name).startswith("Triton, bfloat16")
