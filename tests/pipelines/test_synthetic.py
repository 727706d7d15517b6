import re
import subprocess
import sys

import pytest
import torch

from fastdeit.pipelines import Augmentation, SyntheticIndex, eval_loader, show, train_loader


def test_synthetic_batches_are_resident_and_mixed_like_real_ones(photos):
    pytest.importorskip("nvidia.dali")
    index = SyntheticIndex(images=96, classes=10)
    loader = train_loader(index, batch_size=16, input_size=32, seed=5)
    first, *rest = list(loader)
    assert len(rest) == 5 and first.images.shape == (16, 32, 32, 3)
    assert all(batch.images.data_ptr() == first.images.data_ptr() for batch in rest)
    assert (first.labels == first.indices % 10).all()
    real = next(iter(train_loader(photos, batch_size=16, input_size=32, seed=5)))  # as many images, so the same draws
    assert torch.equal(real.indices, first.indices)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first.mix, real.mix))
    assert sum((batch.indices >= 0).sum() for batch in eval_loader(index, batch_size=40)) == 96


def test_synthetic_images_do_without_dali():
    program = """
import sys
sys.modules["nvidia.dali"] = None  # importing it raises
from fastdeit.pipelines import SyntheticIndex, eval_loader, train_loader
index = SyntheticIndex(images=16, classes=2)
assert len(list(train_loader(index, batch_size=8, input_size=32))) == 2
assert len(list(eval_loader(index, batch_size=8, input_size=32))) == 2
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_show_draws_a_picture(photos, tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali")
    pytest.importorskip("tyro")
    out = tmp_path / "out.png"
    root = photos.path(0).rsplit("/train/", 1)[0]
    monkeypatch.setattr("sys.argv", ["show", root, str(out), "--aa", "rand-m5"])
    show.main()
    assert out.stat().st_size > 50_000
    cells = show.batch(photos, Augmentation(), 8)
    assert len(cells) == 8 and all(image.shape == (224, 224, 3) for _, image in cells)


@pytest.mark.parametrize(
    "options, words",
    [(["--image", "999"], "--image 999"), (["--aa", "nonsense"], "RandAugment"), (["--split", "x"], "x")],
)
def test_show_refuses_in_a_sentence(photos, tmp_path, monkeypatch, capsys, options, words):
    pytest.importorskip("tyro")
    root = photos.path(0).rsplit("/train/", 1)[0]
    monkeypatch.setattr("sys.argv", ["show", root, str(tmp_path / "out.png"), *options])
    with pytest.raises(SystemExit, match=r"^2$"):
        show.main()
    assert re.match(f"error: .*{words}", capsys.readouterr().err)
