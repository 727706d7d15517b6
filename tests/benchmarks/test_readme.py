"""README.md and docs show what the records hold."""

import json

import pytest

from benchmarks import readme


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_a_page_is_what_the_records_say(page):
    text = page.read_text()
    assert readme.PLACE.findall(text), f"{page} has no tables of records"
    assert readme.up_to_date(text) == text, "run: python -m benchmarks.readme"


def test_a_changed_record_makes_it_stale(tmp_path, monkeypatch):
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    headline = {"what": "loss", "ours": "10 us", "peer": "eager", "theirs": "25 us", "ratio": 2.5, "floor_share": 0.8}
    (folder / "loss.json").write_text(json.dumps({"headlines": [headline]}))
    monkeypatch.setattr(readme, "RECORDS", tmp_path)
    text = readme.up_to_date("before\n<!-- table: speed -->\nold\n<!-- end -->\nafter\n")
    assert text.startswith("before\n<!-- table: speed -->\n| on nvidia-h200 |") and text.endswith(
        "<!-- end -->\nafter\n"
    )
    row = "| [loss](benchmarks/records/nvidia-h200/loss.csv) | 10 us | 25 us (eager) | 2.50 x | 80 % |"
    assert row in text and "old" not in text
    (folder / "loss.json").write_text(json.dumps({"headlines": [headline | {"ratio": 0.4}]}))
    assert readme.up_to_date(text) != text
