"""What a kernel's benchmark keeps: what was measured, with its floor; who could not be, with the reason."""

import argparse
import csv
import json

import pytest
import torch

from benchmarks import attention as benchmark
from benchmarks.kernel_table import KernelTable

SETTINGS = argparse.Namespace(device="cpu", quick=False, no_record=True)


@pytest.fixture
def table(tmp_path):
    table = KernelTable("attention", SETTINGS, torch.float32, seconds=0.01)
    table.record.folder = tmp_path
    return table


def test_record_holds_what_was_measured_and_names_the_rest(table, tmp_path, monkeypatch):
    def wrong(q, k, v):
        return 1.01 * torch.nn.functional.scaled_dot_product_attention(q, k, v)  # heads and tokens mistaken, too

    def nan(q, k, v):
        return q * k * v * float("nan")

    monkeypatch.setitem(benchmark.PEERS, "wrong", lambda quick: wrong)
    monkeypatch.setitem(benchmark.PEERS, "nan", lambda quick: nan)
    benchmark.measure(table, True, (2, 198, 6), torch.float32, ["sdpa flash", "wrong", "nan"])

    rows = list(csv.DictReader((tmp_path / "attention.csv").open()))
    assert [(row["contender"], row["case"].split(", ")[0]) for row in rows] == [
        (name, direction) for direction in ("forward", "forward + backward") for name in ("fastdeit", "sdpa flash")
    ]
    ceilings = table.ceilings
    tensor, product = 2 * 198 * 6 * 64 * 4, 2 * 2 * 6 * 198**2 * 64
    for row, tensors, products in zip(rows[::2], (4, 12), (2, 7)):
        floor = 1e6 * max(tensors * tensor / ceilings.bandwidth, products * product / ceilings.matmul)
        assert float(row["floor_us"]) == pytest.approx(floor, abs=0.006)
        assert float(row["floor_share"]) == pytest.approx(floor / float(row["us"]), abs=0.002)

    described = json.loads((tmp_path / "attention.json").read_text())
    missing = described["not measured"]
    assert sum("wrong: ValueError: wrong numbers" in entry for entry in missing) == 2
    assert sum("nan: ValueError: wrong numbers, off by nan" in entry for entry in missing) == 2
    for headline, ours, theirs in zip(described["headlines"], rows[::2], rows[1::2], strict=True):
        assert headline["peer"] == "sdpa flash"
        assert headline["ratio"] == pytest.approx(float(theirs["us"]) / float(ours["us"]), abs=0.002)
    for picture in ("attention.png", "attention_roofline.png"):
        assert (tmp_path / picture).stat().st_size > 1000


def test_ours_must_be_right(table, monkeypatch):
    monkeypatch.setattr(benchmark, "attention", lambda q, k, v: 0 * q)
    with pytest.raises(ValueError, match="wrong numbers"):
        benchmark.measure(table, False, (2, 9, 3), torch.float32, [])
