"""Every flag that the pages for newcomers name exists, here or in the program that they come from."""

import dataclasses
import re
from pathlib import Path

import pytest

from fastdeit.config import Config

DOCS = Path(__file__).parents[1] / "docs"
TIMM = set(
    "--amp --amp-dtype --aug-repeats --crop-pct --data-dir --grad-accum-steps --img-size --initial-checkpoint "
    "--kd-distill-type --kd-model-name --kd-token-distill-type --lr-base --lr-base-scale --lr-base-size --num-classes "
    "--task-loss-weight --torchcompile".split()
)
OTHERS = {"migrating.md": TIMM | {"--format"}, "faq.md": {"--no-compile"}}  # --format is a flag of export


@pytest.mark.parametrize("page", OTHERS)
def test_flags_exist(page):
    groups = [getattr(Config(), group.name) for group in dataclasses.fields(Config)]
    ours = {"--" + field.name.replace("_", "-") for group in groups for field in dataclasses.fields(group)}
    named = set(re.findall(r"--[a-z][a-z-]*[a-z]", (DOCS / page).read_text()))
    assert named - ours == OTHERS[page]
