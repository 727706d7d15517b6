"""The low-frequency crop beside torch.fft in float64."""

import math

import pytest
import torch

from fastdeit.training.low_frequencies import LowFrequencies

CPU = torch.device("cpu")
# odd and even, before and after; the sizes of the curriculum; no squares
SIZES = [(7, 5), (7, 4), (8, 5), (8, 6), (28, 14), (28, 21), (224, 96), (224, 160), ((12, 9), (6, 4)), (8, 8), (7, 7)]


def sides(size):
    return (size, size) if isinstance(size, int) else size


def images(full, *, channels=3, dtype=torch.float64):
    return torch.randn(2, channels, *sides(full), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        dtype
    )


def cropped(full, size, x):
    return LowFrequencies(full, size, CPU, x.dtype)(x)


def centre(spectrum, dim, new):
    """The `new` lowest frequencies of one dimension, 0 in the middle as fftshift has it."""
    shifted = torch.fft.fftshift(spectrum, dim)
    start = spectrum.shape[dim] // 2 - new // 2
    return torch.fft.ifftshift(shifted.narrow(dim, start, new), dim)


@pytest.mark.parametrize("full, size", SIZES)
def test_it_is_the_crop_of_the_spectrum_along_each_axis(full, size):
    x = expected = images(full)
    for dim, new in zip((2, 3), sides(size)):
        old = x.shape[dim]
        expected = torch.fft.ifft(centre(torch.fft.fft(expected, dim=dim), dim, new) * (new / old), dim=dim).real
    torch.testing.assert_close(cropped(full, size, x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("full, size", SIZES)
def test_of_two_axes_at_once_it_leaves_out_one_product_of_sines(full, size):
    """Re(ifft2(crop(fft2(x)) h w / H W)), as the paper has it: the same where a side is odd; where both are even all
    but a chequerboard, that of the one coefficient which is highest along both axes."""
    x, (height, width) = images(full), sides(size)
    spectrum = centre(centre(torch.fft.fft2(x), 2, height), 3, width)
    paper = torch.fft.ifft2(spectrum * (height * width / math.prod(sides(full)))).real
    board = (-1.0) ** (torch.arange(height)[:, None] + torch.arange(width))
    rest = cropped(full, size, x) - paper
    if height % 2 or width % 2 or sides(full) == sides(size):
        torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-12)
        return
    torch.testing.assert_close(rest, rest[..., :1, :1] * board, rtol=0, atol=1e-12)
    waves = [torch.arange(old, dtype=torch.float64) * new / old for old, new in zip(sides(full), (height, width))]
    sines = [torch.sin(math.pi * wave) for wave in waves]
    left_out = torch.einsum("bchw,h,w->bc", x, *sines) / math.prod(sides(full))
    torch.testing.assert_close(rest[..., 0, 0], left_out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("full, size", SIZES)
def test_one_colour_stays(full, size):
    color = torch.tensor([-2.0, 0.5, 2.6]).view(1, 3, 1, 1)
    got = cropped(full, size, color.expand(2, 3, *sides(full)))
    torch.testing.assert_close(got, color.expand_as(got), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cycles, share", [(1, 1.0), (6, 1.0), (8, 0.0), (13, 0.0)])
def test_a_wave_is_kept_or_gone(cycles, share):
    """Of 28 pixels, 14 are left: up to 6 waves across the image stay as they were, sampled at every other pixel."""
    wave = torch.cos(2 * math.pi * cycles * torch.arange(28, dtype=torch.float64) / 28 + 0.4)
    got = cropped(28, 14, wave.expand(1, 3, 28, 28))
    torch.testing.assert_close(got, share * wave[::2].expand(1, 3, 14, 14), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype):
    """The error of the result is that of rounding images and result, twice over, and fp32's own."""
    x = images(224)
    exact, got = cropped(224, 96, x), cropped(224, 96, x.to(dtype))
    assert got.dtype == dtype
    rounded = cropped(224, 96, x.to(dtype).double()).to(dtype).double()
    budget = 2 * (rounded - exact).norm() + 1e-6 * exact.norm()
    assert (got.double() - exact).norm() <= budget


def test_memory_formats_and_one_channel():
    x = images(28, dtype=torch.float32)
    torch.testing.assert_close(cropped(28, 21, x.to(memory_format=torch.channels_last)), cropped(28, 21, x))
    torch.testing.assert_close(cropped(28, 21, x[:, :1]), cropped(28, 21, x)[:, :1])


def test_a_compiler_takes_it_whole():
    x = images(28, dtype=torch.float32)
    compiled = torch.compile(LowFrequencies(28, 14, CPU, x.dtype), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), cropped(28, 14, x))
