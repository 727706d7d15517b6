"""The README's commands and Python, in their order, in one folder, with a reader's few images.

What is changed stands in SUBSTITUTES; otherwise only flags are added, which make a run short. A command that is neither
run here nor named in ELSEWHERE fails.
"""

import importlib
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from fastdeit import demo
from fastdeit.__main__ import COMMANDS as COMMANDS_BY_NAME

from .fastdeit.conftest import cli, write_folder  # noqa: F401  cli: a fixture

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = re.findall(
    r"(?:^ {4}|`)((?:python3?|torchrun|make|git|fastdeit) [^`#\n]*?)(?=`|\s*#|\s*$)", README, re.MULTILINE
)
ELSEWHERE = {
    "git clone ... && cd fastdeit": "nothing to run",
    "make train": "installs, then runs the first of the commands here",
    "make test": "runs this",
    "python -m fastdeit.doctor": "tests/fastdeit/test_doctor.py",
    "python -m benchmarks all": "tests/benchmarks/test_quick.py",
    "python -m benchmarks.data_efficiency": "hours; in parts by tests/benchmarks/test_data_efficiency.py",
    "python benchmarks/gpu_checks.py": "needs a GPU",
}
SUBSTITUTES = {"resnet50": "test_resnet", "--views 30": "--views 1", "pretrained=True": "pretrained=False"}
SHORT = "--epochs 1 --num-workers 1 --device cpu --tracker none"
SMALL = "--input-size 32 --batch-size 12 --warmup-epochs 0"


def substituted(text: str) -> str:
    for written, here in SUBSTITUTES.items():
        text = text.replace(written, here)
    return text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the reader's images in DIR, and the published weights that the commands would download."""
    for library in ("tyro", "nvidia.dali", "timm", "onnx", "sklearn", "huggingface_hub"):
        pytest.importorskip(library)
    from .fastdeit import hub

    root = tmp_path_factory.mktemp("readme")
    write_folder(root / "DIR", train=24, size=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "hub"))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        for name in ("deit_tiny_patch16_224", "test_resnet"):
            hub.publish(root / "hub", name)
        patch.chdir(root)
        patch.setattr(demo, "TEACHER_EPOCHS", 3)  # of the first command
        yield root


def test_the_commands(place, cli):  # noqa: F811
    """Each ends with 0, and leaves the files that the text speaks of."""
    run, wanted = "", [command for command in COMMANDS if command not in ELSEWHERE]
    assert len(wanted) >= 13
    for written in wanted:
        words = shlex.split(substituted(written).replace("runs/RUN", run))
        if words[0] == "torchrun":
            check_flags(words[words.index("fastdeit.train") + 1 :])
            continue
        if words[0] == "fastdeit":
            assert words[1] in COMMANDS_BY_NAME
            continue
        assert words[:2] == ["python", "-m"], written
        if words[2] in ("fastdeit.train", "fastdeit.teach") and "--help" not in words:
            words += shlex.split(f"{SHORT} {SMALL}" if "--data-path" in words else SHORT)
        code, out, err = cli(main_of(words[2]), *words[3:])
        assert code == 0, f"{written}\n{out}\n{err}"
        if not run:  # the first command's
            (folder,) = (place / "runs").glob("demo-*")
            run = f"runs/{folder.name}"
    files = {file.name for file in (place / run).iterdir()}
    assert {"last", "best", "summary.json", "metrics.jsonl", "first_batch.png", "report.html"} <= files
    assert (place / "OUT" / "train-000000.tar").is_file()
    for folder in ("deit", "CACHE", "runs/teacher/last"):
        assert (place / folder).is_dir(), folder


def main_of(name: str):
    module = importlib.import_module(name)
    return module.main if hasattr(module, "main") else importlib.import_module(f"{name}.__main__").main


def check_flags(words: list[str]) -> None:
    """Of a command for several processes, which tests/fastdeit/test_distributed.py starts."""
    from fastdeit.cli import parse_config

    assert parse_config(words).data.batch_size == int(words[words.index("--batch-size") + 1])


def test_the_job_for_slurm(place):
    (script,) = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    check_flags(shlex.split(re.search(r"^' train (.*)$", script, re.MULTILINE)[1]))


def test_the_python(place, monkeypatch):
    """In one namespace, which has what the text takes as given."""
    import timm
    import torch

    import fastdeit
    from fastdeit import api

    small = {"epochs": 1, "input_size": 32, "batch_size": 12, "warmup_epochs": 0, "num_workers": 1, "device": "cpu"}
    monkeypatch.setattr(fastdeit, "train", lambda **given: api.train(**given, **small, tracker="none"))
    shutil.copy(place / "DIR/val/red/0.png", place / "photo.jpg")
    names = {
        "timm": timm, "AutoModelForImageClassification": Transformers, "name": "google/vit-base-patch16-224",
        "qkv": torch.randn(2, 5, 3, 4, 16), "cls_logits": torch.zeros(2, 10), "dist_logits": torch.zeros(2, 10),
        "labels": torch.tensor([1, 2]), "teacher_logits": torch.eye(2, 10),
    }  # fmt: skip
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(substituted(block), "README.md", "exec"), names)
    assert names["run"].metrics.keys() == {"cls"} and names["x"].shape == (2, 5, 4, 16)
    assert names["loss"].item() == pytest.approx(math.log(10))
    assert names["model"].config._attn_implementation == "fastdeit"


class Transformers:
    """AutoModelForImageClassification, for a small model with random weights."""

    @staticmethod
    def from_pretrained(name, **options):
        from transformers import ViTConfig, ViTForImageClassification

        return ViTForImageClassification._from_config(
            ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64), **options
        )
