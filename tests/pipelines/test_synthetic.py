import importlib
import sys

import pytest
import torch

import fastdeit
from fastdeit.pipelines import SyntheticIndex, eval_loader, train_loader


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


def test_synthetic_images_do_without_dali(monkeypatch):
    monkeypatch.setattr(fastdeit, "pipelines", fastdeit.pipelines)
    for name in [name for name in sys.modules if name.startswith("fastdeit.pipelines")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("nvidia", "nvidia.dali"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    anew = importlib.import_module("fastdeit.pipelines")
    index = anew.SyntheticIndex(images=16, classes=2)
    assert len(list(anew.train_loader(index, batch_size=8, input_size=32))) == 2
    assert len(list(anew.eval_loader(index, batch_size=8, input_size=32))) == 2
