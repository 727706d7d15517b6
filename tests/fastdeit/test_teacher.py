import pytest
import timm
import torch

from fastdeit.teacher import Teacher

IMAGENET = {"student_mean": (0.485, 0.456, 0.406), "student_std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7)
    model(torch.randn(8, 3, 32, 32))  # running statistics that are not those of the start
    return model


def teacher(model, **options):
    settings = {"input_size": 32, "device": "cpu", "dtype": torch.float32, **HALF, **IMAGENET, **options}
    return Teacher(model, **settings)


def pixels():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def normalise(pixels, mean, std):
    return (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def test_sees_the_images_with_its_own_normalisation(model):
    answers = teacher(model)(normalise(pixels(), *IMAGENET.values()))
    expected = model.eval()(normalise(pixels(), *HALF.values()))
    torch.testing.assert_close(answers, expected.detach(), atol=1e-4, rtol=1e-4)


def test_sees_the_images_at_its_own_size(model):
    answers = teacher(model, mean=IMAGENET["student_mean"], std=IMAGENET["student_std"], input_size=64)(pixels())
    resized = torch.nn.functional.interpolate(pixels(), (64, 64), mode="bicubic", antialias=True)
    torch.testing.assert_close(answers, model.eval()(resized).detach())


def test_is_frozen_and_leaves_no_graph(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    answering = teacher(model)
    answers = answering(pixels().requires_grad_())
    assert not answers.requires_grad and not answers.is_inference()
    assert not any(parameter.requires_grad for parameter in answering.model.parameters())
    assert not answering.model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
