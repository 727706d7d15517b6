"""The Dockerfile names what exists here; nothing builds it in these tests."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
LINES = [line.split(None, 1) for line in TEXT.splitlines() if line and not line.startswith("#")]
PROJECT = (ROOT / "pyproject.toml").read_text()


def values(instruction: str) -> list[str]:
    return [rest for name, rest in LINES if name == instruction]


def test_what_it_copies_is_in_the_context():
    """And what it installs is not left out of it."""
    ignored = set((ROOT / ".dockerignore").read_text().split())
    for sources in values("COPY"):
        for source in sources.split()[:-1]:
            assert (ROOT / source).exists()
    needed = {"src", "fastdeit", "kernels", "pipelines", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
    assert not needed & ignored and all((ROOT / name).exists() for name in needed)


def test_what_it_installs_and_runs_is_what_the_project_declares():
    (python,) = re.findall(r"^python:3\.(\d+)-slim$", values("FROM")[0])
    (least,) = re.findall(r'requires-python = ">=3\.(\d+)"', PROJECT)
    assert int(python) >= int(least)
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", TEXT)
    assert all(re.search(rf"^{extra} = \[", PROJECT, re.MULTILINE) for extra in extras.split(","))
    assert values("ENTRYPOINT") == ['["fastdeit"]'] and '\nfastdeit = "fastdeit.__main__:script"' in PROJECT
    assert values("CMD") == ['["--help"]']
