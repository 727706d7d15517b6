"""A model at a smaller size than its own: positions by the formula, everything else as a model of that size."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastdeit.models.deit import create_model
from fastdeit.models.positions import regridded, regridding, take_sizes


def student(**options):
    torch.manual_seed(0)
    options = {"img_size": 32, "num_classes": 3, **options}
    return create_model("deit_nano_distilled_patch4_16", **options)


def test_by_hand():
    """From 4 positions to 2: the first is centred between positions 0 and 1, its triangle is two wide: weights 3/4,
    3/4, 1/4 at a distance of 1/2, 1/2, 3/2, of a sum of 7/4. Rows and columns by turns."""
    one = torch.tensor([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7
    torch.testing.assert_close(regridding((4, 4), (2, 2)), torch.kron(one, one))
    torch.testing.assert_close(regridding((4, 3), (2, 3)), torch.kron(one, torch.eye(3)))


@pytest.mark.parametrize(
    "grid, smaller", [((14, 14), (6, 6)), ((14, 14), (10, 10)), ((14, 10), (12, 5)), ((4, 4), (4, 4))]
)
def test_it_is_bilinear_antialiased_interpolation(grid, smaller):
    matrix = regridding(grid, smaller)
    pos_embed = torch.randn(1, 2 + grid[0] * grid[1], 8)
    image = pos_embed[:, 2:].unflatten(1, grid).permute(0, 3, 1, 2).double()
    expected = F.interpolate(image, smaller, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    got = regridded(pos_embed, matrix)
    torch.testing.assert_close(got[:, 2:].double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(got[:, :2], pos_embed[:, :2])
    assert (matrix.sum(0) > 0.3 * matrix.sum(0).mean()).all()  # all positions have their part, and learn


@pytest.mark.parametrize("name", ["deit_nano_distilled_patch4_16", "deit_nano_patch4_16", "deit3_small_patch16_224"])
def test_everything_else_is_a_model_of_that_size(name):
    big, small = (32, 20) if "nano" in name else (64, 48)
    torch.manual_seed(0)
    model = create_model(name, img_size=big, num_classes=3)
    take_sizes(model, [(small, small)])
    other = create_model(name, img_size=small, num_classes=3)
    state = model.state_dict()
    prefix = 0 if model.arch.deit3 else model.num_prefix_tokens
    image = state["pos_embed"][:, prefix:].unflatten(1, model.grid_size).permute(0, 3, 1, 2)
    resized = F.interpolate(image, other.grid_size, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    other.load_state_dict({**state, "pos_embed": torch.cat([state["pos_embed"][:, :prefix], resized], dim=1)})
    images = torch.randn(2, 3, small, small)
    torch.testing.assert_close(model.eval()(images), other.eval()(images))


def test_the_parameter_stays_whole_and_learns_everywhere():
    model = student()
    before = {name: value.shape for name, value in model.state_dict().items()}
    take_sizes(model, [(16, 16), (24, 24)])
    assert {name: value.shape for name, value in model.state_dict().items()} == before
    assert not list(model.buffers())
    for size in (16, 24, 32):
        model.zero_grad()
        model.train()(torch.randn(2, 3, size, size))[0].square().sum().backward()
        assert (model.pos_embed.grad != 0).any(dim=-1).all()
    assert copy.deepcopy(model)(torch.randn(2, 3, 16, 16))[0].shape == (2, 3)


def test_other_sizes_are_refused():
    model = student()
    take_sizes(model, [(16, 16)])
    for size in (12, 24, 36):
        with pytest.raises(ValueError, match="takes images of 32 x 32"):
            model(torch.zeros(1, 3, size, size))


def test_positions_keep_their_precision_under_autocast():
    model = student()
    take_sizes(model, [(16, 16)])
    with torch.autocast("cpu", torch.bfloat16):
        got = regridded(model.pos_embed, model.regriddings[16, 16])
    assert got.dtype == torch.float32
    assert torch.equal(got, regridded(model.pos_embed, model.regriddings[16, 16]))


def test_each_size_is_compiled_once_and_for_itself():
    """With shapes that are constants, as kernels and CUDA graphs need them."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model = student().eval()
    take_sizes(model, [(16, 16), (24, 24)])
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for size in (16, 24, 32, 16, 24, 32):
        images = torch.randn(2, 3, size, size)
        torch.testing.assert_close(compiled(images), model(images))
    assert counter.frame_count == 3  # of dynamic shapes it would be two
