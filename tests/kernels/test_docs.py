"""docs/kernels.md: its examples run, one after another, and it names every operation and argument there is."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from fastdeit import kernels

PAGE = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_examples_run():
    for library in ("timm", "transformers"):
        pytest.importorskip(library)
    names = {"torch": torch}
    assert len(EXAMPLES) >= 9
    for example in EXAMPLES:
        exec(compile(example, "docs/kernels.md", "exec"), names)


@pytest.mark.parametrize("name", kernels.__all__)
def test_every_public_name_is_there(name):
    assert re.search(rf"\b{name}\b", PAGE)


OPERATIONS = (
    "attention attention_qkvpacked attention_varlen distillation_loss attention_distillation_loss add_layer_norm "
    "bias_gelu mlp"
)


@pytest.mark.parametrize("name", OPERATIONS.split())
def test_signatures_are_those_of_the_functions(name):
    written = re.search(rf"^    {name}\((.*?)\)$", PAGE, re.DOTALL | re.MULTILINE)[1]
    parameters = inspect.signature(getattr(kernels, name)).parameters.values()
    expected = [p.name + ("" if p.default is p.empty else f"={p.default!r}") for p in parameters]
    assert [part for part in re.split(r",\s*", written.replace("'", '"')) if part != "*"] == [
        part.replace("'", '"') for part in expected
    ]
