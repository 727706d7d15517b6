import copy

import pytest
import timm
import torch
from torch import nn

from fastdeit.distill import inference
from fastdeit.distill.inference import fold_batchnorm
from fastdeit.distill.teacher import Teacher
from fastdeit.distributed.world import World
from fastdeit.errors import UserError
from fastdeit.models.loading import LoadedModel

IMAGENET = {"student_mean": (0.485, 0.456, 0.406), "student_std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def with_statistics(name, **options):
    """A timm model whose BatchNorms are not those of the start."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


@pytest.fixture
def model():
    return with_statistics("test_resnet", num_classes=7)


def teacher(model, dtype=torch.float32, **options):
    loaded = LoadedModel(
        **{"name": "it", "model": copy.deepcopy(model), "input_size": 32, "classes": None, **HALF, **options}
    )
    return Teacher(loaded, **IMAGENET, device="cpu", dtype=dtype)


def pixels():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def normalise(pixels, mean, std):
    return (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def test_sees_the_images_with_its_own_normalisation(model):
    answers = teacher(model)(normalise(pixels(), *IMAGENET.values()))
    expected = model(normalise(pixels(), *HALF.values()))
    torch.testing.assert_close(answers, expected.detach(), atol=1e-4, rtol=1e-4)


def test_sees_the_images_at_its_own_size(model):
    same = {"mean": IMAGENET["student_mean"], "std": IMAGENET["student_std"]}
    answers = teacher(model, **same, input_size=64)(pixels())
    resized = torch.nn.functional.interpolate(pixels(), (64, 64), mode="bicubic", antialias=True)
    torch.testing.assert_close(answers, model(resized).detach(), atol=1e-5, rtol=1e-5)


def test_is_frozen_and_leaves_no_graph(model):
    answering = teacher(model)
    before = copy.deepcopy(answering.network.state_dict())
    answers = answering(pixels().requires_grad_())
    assert not answers.requires_grad and not answers.is_inference()
    assert not any(parameter.requires_grad for parameter in answering.network.parameters())
    assert not any(module.training for module in answering.network.modules())
    for name, value in answering.network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_answers_may_be_saved_for_a_backward_pass(model):
    student = torch.randn(4, 7, requires_grad=True)
    answers = teacher(model)(pixels())
    nn.functional.kl_div(student.log_softmax(1), answers.softmax(1), reduction="batchmean").backward()
    (student * answers).sum().backward()
    assert student.grad.isfinite().all()


def test_keeps_its_precision_inside_autocast(model):
    answering = teacher(model)
    with torch.autocast("cpu", torch.bfloat16):
        answers = answering(pixels())
    assert torch.equal(answers, answering(pixels())) and answers.dtype == torch.float32


# BatchNorm2d, BatchNormAct2d with squeeze-and-excitation, depthwise with padding "same", normalisation before the
# convolution (nothing to fold but what follows one), outputs joined by concatenation, none at all.
NETWORKS = {
    "test_resnet": (15, 15),
    "regnety_002": (44, 44),
    "tf_efficientnet_b0": (49, 49),
    "resnetv2_50": (32, 49),
    "densenet121": (59, 121),
    "test_vit": (0, 0),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_folded_networks_answer_as_before(name):
    model = with_statistics(name)
    size = 160 if name == "test_vit" else 64
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = model(images)
    folded, count = fold_batchnorm(model, images[:1])
    assert (count, sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())) == NETWORKS[name]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == NETWORKS[name][1] - count
    torch.testing.assert_close(folded(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(model(images), expected), "the given network was changed"


def test_a_convolution_used_without_its_batchnorm_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            nn.init.constant_(self.norm.bias, 1.0)

        def forward(self, images):
            x = self.conv(images)
            return (self.norm(x) + x).mean((2, 3))

    model = Twice().eval()
    folded, count = fold_batchnorm(model, torch.randn(2, 3, 8, 8))
    assert folded is model and count == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_and_its_agreement_is_reported(model, dtype):
    exact, half = teacher(model), teacher(model, dtype)
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    expected, answers = exact(images), half(images)
    assert answers.dtype == dtype
    bound = 4 * torch.finfo(dtype).eps * expected.abs().max()
    assert (answers - expected).abs().max() < bound
    agreement = (answers.argmax(1) == expected.argmax(1)).float().mean().item()
    sentences = half.check([images[:32], images[32:]])
    assert f"agrees with fp32 on {100 * agreement:.2f} % of 64 training views" in sentences[0]
    assert len(sentences) == (1 if agreement >= 0.99 else 2)
    assert half.plain is None, "the float32 teacher still takes memory"


def test_a_warning_where_half_precision_decides_otherwise(model):
    half = teacher(model, torch.bfloat16)
    half.network.model.fc.weight.neg_()
    sentences = half.check([pixels()])
    assert sentences[1].startswith("warning:") and "--teacher-precision fp16" in sentences[1]


def test_an_overflow_is_an_error(model):
    half = teacher(model, torch.float16)
    half.network.model.fc.bias.fill_(torch.inf)
    with pytest.raises(UserError, match="--teacher-precision"):
        half.check([pixels()])


def test_compiled_it_answers_the_same():
    torch.manual_seed(0)
    small = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    answering, compiled = teacher(small.eval()), teacher(small.eval())
    compiled.compile()
    torch.testing.assert_close(compiled(pixels()), answering(pixels()), atol=1e-5, rtol=1e-4)
    assert not compiled(pixels()).is_inference()


def test_the_memory_format_is_measured_once_and_remembered(model, tmp_path, monkeypatch):
    world, file = World(torch.device("cpu")), tmp_path / "formats.json"
    first = inference.choose(model, "test_resnet", pixels(), world, file)
    assert first in inference.FORMATS
    monkeypatch.setattr(inference, "measure", lambda *_: pytest.fail("measured again"))
    assert inference.choose(model, "test_resnet", pixels(), world, file) == first
    monkeypatch.setattr(inference, "measure", lambda *_: {"contiguous": 2.0, "channels_last": 1.0})
    assert inference.choose(model, "test_resnet", pixels()[:2], world, file) == "channels_last"
    assert inference.choose(model, "test_resnet", pixels(), world, file) == first


def test_all_memory_formats_are_measured(model):
    seconds = inference.measure(model, pixels())
    assert seconds.keys() == {"contiguous", "channels_last", "joined"}
    assert all(0 < value < 10 for value in seconds.values())


@pytest.mark.gpu
def test_on_a_gpu_in_half_precision_laid_out_and_compiled(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = teacher(model)(pixels())
    loaded = LoadedModel("it", copy.deepcopy(model), 32, *HALF.values(), None)
    fast = Teacher(loaded, **IMAGENET, device="cuda", dtype=torch.float16)
    fast.choose_memory_format(4, World(torch.device("cuda")))
    fast.compile()
    images = pixels().cuda().to(memory_format=torch.channels_last)
    answers = fast(images.bfloat16())
    assert answers.dtype == torch.float16 and not answers.is_inference()
    # The images were rounded to bfloat16, as the student's are.
    assert (answers.cpu() - expected).abs().max() < 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
    assert "training views" in fast.check([images])[0]
    assert (tmp_path / "fastdeit" / "memory_formats.json").is_file()
