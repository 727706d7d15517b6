"""The low frequencies of images, as smaller images: a crop of their Fourier spectrum.

Along one axis of N pixels, of which n are to be left, the spectrum X = DFT(x) keeps its n lowest frequencies
k = -floor(n / 2), ..., ceil(n / 2) - 1, is scaled by n / N and transformed back with n points. Of that the real part is

    y[i] = sum over j of x[j] m[i, j],    m[i, j] = 1 / N  sum over k of cos(2 pi k (i / n - j / N))

So the crop is one small matrix product along each axis: no complex numbers, no FFT, nothing that a compiler or a CUDA
graph could not take. Images of one colour keep it. This is the low-frequency cropping of EfficientTrain (Wang et al.,
arXiv 2405.08768: crop of the 2-d DFT, scaled by the ratio of the areas, inverse 2-d DFT), done axis by axis: for odd n
the same; for even n the two differ in the one coefficient that is highest along both axes, whose product of two sines
is left out here. (The authors' released code resizes by a Lanczos filter instead.)
"""

import math

import torch
from torch import Tensor

from fastdeit.config import Size, height_width


class LowFrequencies:
    """(B, C, height, width) images of size `full` -> (B, C, height, width) of size `size`, of the same type."""

    def __init__(self, full: Size, size: Size, device: torch.device, dtype: torch.dtype):
        sides = zip(height_width(full), height_width(size))
        self.rows, self.columns = (cropping(*side).to(device, dtype) for side in sides)

    def __call__(self, images: Tensor) -> Tensor:
        return self.rows @ images @ self.columns.T


def cropping(old: int, new: int) -> Tensor:
    """(new, old) float64: m above."""
    frequencies = torch.arange(-(new // 2), new - new // 2, dtype=torch.float64)
    shift = torch.arange(new, dtype=torch.float64)[:, None] / new - torch.arange(old, dtype=torch.float64) / old
    return torch.cos(2 * math.pi * frequencies[:, None, None] * shift).sum(0) / old
