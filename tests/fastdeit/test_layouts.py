import pytest
import torch
from torch import nn

from fastdeit.distill.conv_relu import ConvReLU
from fastdeit.distill.folding import fold_batchnorm
from fastdeit.distill.layouts import PointwiseReLU, available, fuse_relu, is_merged, join_pointwise
from fastdeit.distill.teacher import Teacher
from fastdeit.distributed.world import World
from fastdeit.models.deit import create_model
from fastdeit.models.loading import LoadedModel
from fastdeit.tuning import Tuner, timing

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


# Every convolution before a ReLU: the stem's, two of each block, and the first of squeeze and excitation.
@pytest.mark.parametrize("name, count", [("resnet26t", 3 + 2 * 8), ("regnety_002", 1 + 3 * 13)])
def test_convolutions_are_fused_with_their_relus(name, count):
    folded, _ = fold_batchnorm(with_statistics(name, num_classes=5), pixels())
    fused, pairs = fuse_relu(folded, pixels())
    assert pairs == count == sum(isinstance(module, ConvReLU) for module in fused.modules())
    with torch.no_grad():
        expected = folded(pixels())
        logits = fused(pixels().to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": (1, 5), "padding": (0, 2), "groups": 2},
        {"kernel_size": 3, "dilation": 2, "bias": False}, {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": "valid"},
    ],
)  # fmt: skip
def test_a_fused_layer_is_convolution_and_relu(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, **options).double()
    images = torch.randn(3, 6, 9, 8, dtype=torch.float64)
    layer = ConvReLU(conv)
    torch.testing.assert_close(layer(images), conv(images).relu(), rtol=1e-12, atol=1e-12)
    assert layer(images).is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(images)
    assert torch.equal(compiled, layer(images))
    arguments = (images, layer.weight, layer.bias, *layer.shape)
    torch.library.opcheck(
        torch.ops.fastdeit.conv_relu.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


# ---------------------------------------------------------------------------------------------------------------------
# As the teacher is asked for


def tuned(tmp_path, model, **options):
    """A teacher of this model and its tuner, which has really timed the layouts."""
    loaded = LoadedModel(name="it", model=model, input_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, classes=None)
    teacher = Teacher(loaded, student_mean=(0.4,) * 3, student_std=(0.3,) * 3, device="cpu")
    tuner = Tuner(World(torch.device("cpu")), measures=True, file=tmp_path / "tuning.json")
    teacher.tune(tuner, (4, 3, 32, 32), torch.float32, **{"compiled": False, **options})
    return teacher, tuner.choices[0]


@pytest.mark.parametrize("name", ["plain", "contiguous", "channels_last", "joined"])
def test_the_teacher_takes_the_fastest_layout(tmp_path, monkeypatch, name):
    real = timing.in_turns

    def favour(calls, *options, **more):
        """Real times, but for one."""
        return real(calls, *options, **more) | {name: 1e-3}

    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "in_turns", favour)
    model = with_statistics("test_resnet", num_classes=5)
    expected = model((pixels() - 0.5) / 0.5).detach()
    teacher, choice = tuned(tmp_path, model)
    assert choice.chosen == name and [row.candidate for row in choice.rows] == [
        "plain", "contiguous", "channels_last", "joined"
    ]  # fmt: skip
    assert all(row.ms > 0 and row.error < 1e-5 for row in choice.rows)
    assert is_merged(teacher.network) == (name == "joined")
    seen = []
    teacher.network.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    images = ((pixels() - 0.4) / 0.3).to(memory_format=torch.channels_last)
    torch.testing.assert_close(teacher(images), expected, rtol=1e-3, atol=1e-3)
    assert seen == [name == "contiguous"]
    weight = next(p for p in teacher.network.parameters() if p.ndim == 4 and p.shape[2] > 1)
    assert weight.is_contiguous() == (name in ("plain", "contiguous"))
    assert not any(p.requires_grad for p in teacher.network.parameters())


def test_layouts_are_timed_compiled_where_the_teacher_is(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append((type(module), options)))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    _, choice = tuned(tmp_path, model, compiled=True)
    assert [row.candidate for row in choice.rows if not row.excluded] == ["plain", "channels_last"]
    assert len(compiled) == 2 and all(options == {"dynamic": False} for _, options in compiled)
    assert choice.rows[2].excluded == "no convolution whose output only a ReLU reads" and choice.key["compiled"]


def test_a_transformer_has_one_layout(tmp_path):
    model = create_model("deit_nano_patch4_16", img_size=32)
    assert tuned(tmp_path, model)[1].rows == ()
    assert [*available(model, torch.device("cuda"), compiled=True)] == ["plain"]


def test_layouts_on_a_gpu():
    model, gpu = with_statistics("test_resnet"), torch.device("cuda")
    assert available(model, gpu, compiled=True) == ["plain", "channels_last", "joined", "fused"]
    assert available(model, gpu, compiled=False) == ["plain", "contiguous", "channels_last", "joined", "fused"]
