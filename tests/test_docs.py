"""Every file, module and make target that the documentation names exists."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "LOG.md"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def missing(page: Path, text: str) -> list[str]:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    paths = re.findall(r"\b((?:benchmarks|docs|fastdeit|kernels|pipelines|tests)/[\w/*]+(?:\.\w+)?)", text)
    modules = re.findall(r"python -m ((?:benchmarks|fastdeit)[.\w]*\w)", text)
    targets = re.findall(r"(?:^ {4}|`)make ([a-z-]+)", text, re.MULTILINE)
    return [
        *(link for link in links if not (page.parent / link).exists()),
        *(path for path in paths if not any(ROOT.glob(path))),
        *(module for module in modules if find_spec(module) is None),
        *(target for target in targets if target not in TARGETS),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    assert not missing(page, re.sub(r"facebookresearch/\w+|https?:\S+", "", page.read_text()))


def test_what_does_not_exist_is_noticed():
    text = "[a](docs/no.md) `fastdeit/no.py` python -m fastdeit.no\n    make no\n"
    assert missing(ROOT / "README.md", text) == ["docs/no.md", "docs/no.md", "fastdeit/no.py", "fastdeit.no", "no"]
