import copy
from functools import partialmethod

import pytest
import torch
from torch import nn

from fastdeit.distill.teacher import Teacher
from fastdeit.distributed.world import World
from fastdeit.errors import UserError
from fastdeit.models.loading import LoadedModel
from fastdeit.tuning import Tuner

from .test_folding import pixels, with_statistics

IMAGENET = {"student_mean": (0.485, 0.456, 0.406), "student_std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.fixture
def model():
    return with_statistics("test_resnet", num_classes=7)


def teacher(model, dtype=torch.float32, **options):
    loaded = LoadedModel(
        **{"name": "it", "model": copy.deepcopy(model), "input_size": 32, "classes": None, **HALF, **options}
    )
    return Teacher(loaded, **IMAGENET, device="cpu", dtype=dtype)


def normalise(pixels, mean, std):
    return (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def test_sees_the_images_with_its_own_normalisation(model):
    logits = teacher(model)(normalise(pixels(), *IMAGENET.values()))
    expected = model(normalise(pixels(), *HALF.values()))
    torch.testing.assert_close(logits, expected.detach(), atol=1e-4, rtol=1e-4)


def test_sees_the_images_at_its_own_size(model):
    same = {"mean": IMAGENET["student_mean"], "std": IMAGENET["student_std"]}
    logits = teacher(model, **same, input_size=64)(pixels())
    resized = torch.nn.functional.interpolate(pixels(), (64, 64), mode="bicubic", antialias=True)
    torch.testing.assert_close(logits, model(resized).detach(), atol=1e-5, rtol=1e-5)


def test_is_frozen_and_leaves_no_graph(model):
    live = teacher(model)
    before = copy.deepcopy(live.network.state_dict())
    logits = live(pixels().requires_grad_())
    assert not logits.requires_grad and not logits.is_inference()
    assert not any(parameter.requires_grad for parameter in live.network.parameters())
    assert not any(module.training for module in live.network.modules())
    for name, value in live.network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_logits_may_be_saved_for_a_backward_pass(model):
    student = torch.randn(4, 7, requires_grad=True)
    logits = teacher(model)(pixels())
    nn.functional.kl_div(student.log_softmax(1), logits.softmax(1), reduction="batchmean").backward()
    (student * logits).sum().backward()
    assert student.grad.isfinite().all()


def test_keeps_its_precision_inside_autocast(model):
    live = teacher(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = live(pixels())
    assert torch.equal(logits, live(pixels())) and logits.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_and_its_agreement_is_reported(model, dtype):
    exact, half = teacher(model), teacher(model, dtype)
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    expected, logits = exact(images), half(images)
    assert logits.dtype == dtype
    bound = 4 * torch.finfo(dtype).eps * expected.abs().max()
    assert (logits - expected).abs().max() < bound
    agreement = (logits.argmax(1) == expected.argmax(1)).float().mean().item()
    sentences = half.check([images[:32], images[32:]])
    assert f"agrees with fp32 on {100 * agreement:.2f} % of 64 training views" in sentences[0]
    assert len(sentences) == (1 if agreement >= 0.99 else 2)
    assert half.plain is None, "the float32 teacher still takes memory"


def test_a_warning_where_half_precision_predicts_other_classes(model):
    half = teacher(model, torch.bfloat16)
    half.network.model.fc.weight.neg_()
    sentences = half.check([pixels()])
    assert sentences[1].startswith("warning:") and "--teacher-precision fp16" in sentences[1]


def test_an_overflow_is_an_error(model):
    half = teacher(model, torch.float16)
    half.network.model.fc.bias.fill_(torch.inf)
    with pytest.raises(UserError, match="--teacher-precision"):
        half.check([pixels()])


def test_compiled_it_gives_the_same_logits(monkeypatch):
    # Inductor itself is not under test, and its C++ compiler takes most of a minute.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch.manual_seed(0)
    small = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    live, compiled = teacher(small.eval()), teacher(small.eval())
    compiled.compile()
    torch.testing.assert_close(compiled(pixels()), live(pixels()), atol=1e-5, rtol=1e-4)
    assert not compiled(pixels()).is_inference()


@pytest.mark.gpu
def test_on_a_gpu_in_half_precision_laid_out_and_compiled(model, tmp_path):
    expected = teacher(model)(pixels())
    loaded = LoadedModel(name="it", model=copy.deepcopy(model), input_size=32, classes=None, **HALF)
    fast = Teacher(loaded, **IMAGENET, device="cuda", dtype=torch.float16)
    tuner = Tuner(World(torch.device("cuda", 0)), file=tmp_path / "tuning.json")
    fast.tune(tuner, (4, 3, 32, 32), torch.bfloat16, compiled=True)
    fast.compile()
    images = pixels().cuda().to(memory_format=torch.channels_last)
    logits = fast(images.bfloat16())
    assert logits.dtype == torch.float16 and not logits.is_inference()
    # The images were rounded to bfloat16, as the student's are.
    assert (logits.cpu() - expected).abs().max() < 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
    assert "training views" in fast.check([images])[0]
    assert {row.candidate for row in tuner.choices[0].rows} >= {"plain", "channels_last", "fused"}
    assert tuner.file.is_file()
