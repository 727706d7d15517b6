import pytest
import torch
from torch import nn

from fastdeit.distill import layouts
from fastdeit.distill.folding import fold_batchnorm
from fastdeit.distill.layouts import PointwiseReLU, join_pointwise
from fastdeit.distributed.world import World

from .test_folding import pixels, with_statistics


# The first convolution of each block, and where there is squeeze and excitation, its first one.
@pytest.mark.parametrize("name, count", [("resnet26t", 8), ("regnety_002", 2 * 13)])
def test_bottlenecks_are_joined(name, count):
    folded, _ = fold_batchnorm(with_statistics(name, num_classes=5), pixels())
    joined, pairs = join_pointwise(folded, pixels())
    assert pairs == count == sum(isinstance(module, PointwiseReLU) for module in joined.modules())
    with torch.no_grad():
        expected = folded(pixels())
        logits = joined(pixels().to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert not any(
        parameter.requires_grad
        for part in joined.modules()
        for parameter in part.parameters(recurse=False)
        if isinstance(part, PointwiseReLU)
    )


def test_one_layer_is_convolution_and_relu():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 1).double()
    images = torch.randn(3, 6, 5, 7, dtype=torch.float64).to(memory_format=torch.channels_last)
    joined = PointwiseReLU(conv)(images)
    torch.testing.assert_close(joined, conv(images).relu(), rtol=1e-12, atol=1e-12)
    assert joined.is_contiguous(memory_format=torch.channels_last)


class Branching(nn.Module):
    """A convolution whose output is used before its ReLU, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 8, 1), nn.ReLU()

    def forward(self, images):
        x = self.conv(images)
        return (self.relu(x) - x).mean((2, 3))


@pytest.mark.parametrize(
    "model",
    [
        Branching(),
        nn.Conv2d(3, 4, 3),
        *(
            nn.Sequential(nn.Conv2d(3, 6, 1, **options), nn.ReLU())
            for options in ({"stride": 2}, {"groups": 3}, {"padding": 1})
        ),
    ],
)
def test_nothing_to_join(model):
    joined, pairs = join_pointwise(model.eval(), pixels())
    assert pairs == 0
    with torch.no_grad():
        torch.testing.assert_close(joined(pixels()), model(pixels()), rtol=1e-5, atol=1e-6)


def test_the_memory_format_is_measured_once_and_remembered(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()).eval()
    world, file = World(torch.device("cpu")), tmp_path / "formats.json"
    first = layouts.choose(model, "test_resnet", pixels(), world, file)
    assert first in layouts.FORMATS
    monkeypatch.setattr(layouts, "measure", lambda *_: pytest.fail("measured again"))
    assert layouts.choose(model, "test_resnet", pixels(), world, file) == first
    monkeypatch.setattr(layouts, "measure", lambda *_: {"contiguous": 2.0, "channels_last": 1.0})
    assert layouts.choose(model, "test_resnet", pixels()[:2], world, file) == "channels_last"
    assert layouts.choose(model, "test_resnet", pixels(), world, file) == first


def test_all_memory_formats_are_measured():
    seconds = layouts.measure(with_statistics("test_resnet"), pixels())
    assert seconds.keys() == {"contiguous", "channels_last", "joined"}
    assert all(0 < value < 10 for value in seconds.values())
