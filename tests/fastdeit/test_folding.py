import pytest
import timm
import torch
from torch import nn

from fastdeit.distill.folding import fold_batchnorm


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


def pixels():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


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
def test_folded_networks_give_the_same_logits(name):
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
