"""docs/digits.ipynb: executed, without an error, and its cells work as they stand."""

import json
from pathlib import Path

import pytest

import fastdeit
from fastdeit.demo import digits_folder

NOTEBOOK = Path(__file__).parents[1] / "docs" / "digits.ipynb"


def cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_its_outputs_are_of_one_execution():
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    outputs = [output for cell in cells() for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the attention is shown"
    assert not any(place in NOTEBOOK.read_text() for place in ("/tmp/", "/home/", "/root/", "site-packages"))


def test_its_cells_run(tmp_path, monkeypatch):
    """All but the training, of which a single epoch without a teacher has to do."""
    pytest.importorskip("nvidia.dali")
    pytest.importorskip("tyro")
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    digits_folder(Path("data/digits-100"), labelled=10)
    train, few = fastdeit.train, {"epochs": 1, "warmup_epochs": 0, "distillation_type": "none", "tracker": "none"}
    monkeypatch.setattr(fastdeit, "train", lambda **settings: train(**{**settings, **few, "device": "cpu"}))
    names: dict = {}
    for cell in cells():
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    assert names["run"].metrics["both"] > 0.05 and names["maps"].shape[-2:] == (4, 4)


@pytest.mark.soak
def test_it_runs_in_a_kernel(tmp_path):
    """As its outputs were made, which takes minutes."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [cell["outputs"] for cell in notebook.cells if cell["cell_type"] == "code"]
    assert "<progress" in json.dumps(shown[0]) and "'both'" in json.dumps(shown[1])
