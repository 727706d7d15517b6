"""The table of model families: counted as the models say, and in docs/kernels.md every family is there."""

import torch.nn.functional as F
from torch import nn

from benchmarks import coverage
from fastdeit.kernels.integrations.report import SwapReport


class Half(nn.Module):
    """One call that is served, one that is not, and a layer that attends in another way."""

    def __init__(self):
        super().__init__()
        self.qkv, self.attn = nn.Linear(3, 32), nn.Identity()

    def forward(self, images):
        x = self.qkv(images.flatten(2).transpose(1, 2)).unsqueeze(1)
        x = F.scaled_dot_product_attention(x, x, x)
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_a_row():
    served, rest, difference = coverage.row(Half, 4)
    assert (served, rest) == ("1", "1 x causal") and float(difference) < 1e-12


def test_differences_are_seen(monkeypatch):
    def wrong(model):
        nn.init.ones_(model.qkv.bias)
        return SwapReport(kept={"attn": "for no reason"})

    monkeypatch.setattr(coverage, "apply_to", wrong)
    _, rest, difference = coverage.row(Half, 4)
    assert rest == "1 layer: for no reason" and float(difference) > 1e-3


def test_every_family_is_in_the_docs():
    table = coverage.PAGE.read_text().split(coverage.BEGIN)[1].split(coverage.END)[0]
    for family in (*coverage.TIMM, *coverage.HF):
        assert f"| {family} |" in table
