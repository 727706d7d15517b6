"""mix_normalize in plain PyTorch: the CPU path of training, and the oracle of the tests.

It goes sample by sample, so that a sample stays in the cache from its first byte to its last and its numbers depend on
nothing but itself and its partner. Rows hold the three channels interleaved, (H, 3W), which keeps every operation
contiguous; normalising a rectangle of the partner again is cheaper than keeping a clean copy of the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .noise import Box, pixel_noise


def empty_output(images: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Uninitialised (B, 3, H, W) for images (B, H, W, 3)."""
    B, H, W, _ = images.shape
    if channels_last:
        return images.new_empty((B, H, W, 3), dtype=dtype).permute(0, 3, 1, 2)
    return images.new_empty((B, 3, H, W), dtype=dtype)


def mix_normalize_reference(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    partner: Tensor | None = None,
    lam: Tensor | None = None,
    box: Tensor | None = None,
    erase_box: Tensor | None = None,
    erase_seed: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> Tensor:
    """See api.mix_normalize; the arguments are taken as checked there."""
    B, H, W, _ = images.shape
    samples = _Samples(images, mean, std, erase_box, erase_seed)
    out_BHWC = empty_output(images, dtype, channels_last).permute(0, 2, 3, 1)
    whole = (0, 0, H, W)
    in_place = dtype == torch.float32 and channels_last
    own, other = images.new_empty((2, H, 3 * W), dtype=torch.float32)  # one sample each: they stay in the cache

    partners = list(range(B)) if partner is None else partner.tolist()
    lams = [1.0] * B if lam is None else lam.tolist()
    boxes = [(0, 0, 0, 0)] * B if box is None else [_clip(b, H, W) for b in box.tolist()]
    for i in range(B):
        if in_place:
            own = out_BHWC[i].view(H, 3 * W)
        samples.write(i, whole, own)
        y0, x0, y1, x1 = boxes[i]
        if y1 > y0 and x1 > x0:
            samples.write(partners[i], boxes[i], own[y0:y1, 3 * x0 : 3 * x1])
        elif lams[i] != 1.0:
            samples.write(partners[i], whole, other)
            own.mul_(lams[i]).add_(other.mul_(1.0 - lams[i]))
        if not in_place:
            out_BHWC[i].copy_(own.view(H, W, 3))
    return out_BHWC.permute(0, 3, 1, 2)


class _Samples:
    """The normalised and erased samples of a batch, written rectangle by rectangle where they are wanted."""

    def __init__(self, images: Tensor, mean, std, erase_box: Tensor | None, erase_seed: Tensor | None):
        B, H, W, _ = images.shape
        self.pixels = images.reshape(B, H, 3 * W)
        # Subtract, then multiply: no fused multiply-add can round this differently from one device to the next.
        self.shift = 255.0 * images.new_tensor(mean, dtype=torch.float64).float().repeat(W)
        self.scale = (1.0 / (255.0 * images.new_tensor(std, dtype=torch.float64))).float().repeat(W)
        self.erased: dict[int, tuple[Box, Tensor]] = {}
        if erase_box is not None and erase_seed is not None:
            boxes = [_clip(box, H, W) for box in erase_box.tolist()]
            erased = [i for i, (y0, x0, y1, x1) in enumerate(boxes) if y1 > y0 and x1 > x0]
            seeds = erase_seed.tolist()
            noise = pixel_noise([seeds[i] for i in erased], [boxes[i] for i in erased])
            self.erased = {i: (boxes[i], patch) for i, patch in zip(erased, noise)}

    def write(self, i: int, rectangle: Box, out: Tensor) -> None:
        """Writes sample i's rectangle to out, (y1 - y0, 3 * (x1 - x0)) float32."""
        y0, x0, y1, x1 = rectangle
        columns = slice(3 * x0, 3 * x1)
        out.copy_(self.pixels[i, y0:y1, columns]).sub_(self.shift[columns]).mul_(self.scale[columns])
        if i in self.erased:
            (top, left, bottom, right), noise = self.erased[i]
            ya, xa, yb, xb = max(y0, top), max(x0, left), min(y1, bottom), min(x1, right)
            if yb > ya and xb > xa:
                patch = noise[ya - top : yb - top, 3 * (xa - left) : 3 * (xb - left)]
                out[ya - y0 : yb - y0, 3 * (xa - x0) : 3 * (xb - x0)] = patch


def _clip(box: Sequence[int], H: int, W: int) -> Box:
    y0, x0, y1, x1 = box
    return max(y0, 0), max(x0, 0), min(y1, H), min(x1, W)
