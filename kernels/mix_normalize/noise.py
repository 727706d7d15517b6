"""Counter-based standard normal noise of the erased pixels, in plain PyTorch.

The number at (y, x, c) of an image is a pure function of (seed, y, x, c). With col = 3 * x + c, the position in a row
of interleaved channels, one Philox call serves four neighbouring columns:

    words 0..3 = Philox4x32-10(counter = (col // 4, y, 0, 0), key = (seed mod 2**32, seed >> 32))
    u_i        = ((word_i >> 9) + 1/2) / 2**23                        exact in float32, never 0 or 1
    z_0, z_1   = sqrt(-2 ln u_0) * (cos, sin)(2 pi u_1)               Box-Muller; z_2, z_3 from u_2, u_3
    noise      = z_(col mod 4)

Philox: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), section 3.3 and table 2.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
LOW_32 = 0xFFFFFFFF
CALLS_AT_ONCE = 8192  # Philox calls: enough to hide the cost of an operation, few enough for the cache

Box = tuple[int, int, int, int]  # y0, x0, y1, x1; ends excluded


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of int64 tensors that hold 32-bit words: four of counter, two of key. Returns four such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two 32-bit words overflows int64's sign only: its 64 bits, and so both halves, are right. What
        # stands above the low 32 bits of c1, c3 and the key is rubbish, and masked away where it would matter.
        product0, product2 = c0 * ROUND_MULTIPLIERS[0], c2 * ROUND_MULTIPLIERS[1]
        c0 = (product2 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(LOW_32)
        c2 = (product0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(LOW_32)
        c1, c3 = product2, product0
        k0, k1 = k0 + KEY_INCREMENTS[0], k1 + KEY_INCREMENTS[1]
    return c0, c1 & LOW_32, c2, c3 & LOW_32


def pixel_noise(seeds: Sequence[int], boxes: Sequence[Box]) -> list[Tensor]:
    """The noise of one rectangle of each image: (y1 - y0, 3 * (x1 - x0)) float32, channels interleaved."""
    noise, waiting, calls = [], [], 0
    for i, (y0, x0, y1, x1) in enumerate(boxes):
        waiting.append((seeds[i], boxes[i]))
        calls += (y1 - y0) * (x1 - x0)
        if calls >= CALLS_AT_ONCE or i == len(boxes) - 1:
            noise += _noise_of(waiting)
            waiting, calls = [], 0
    return noise


def _noise_of(images: list[tuple[int, Box]]) -> list[Tensor]:
    """The same for a few images, whose numbers lie one after another through all of the arithmetic."""
    rows, groups, keys, shapes = [], [], [], []
    for seed, (y0, x0, y1, x1) in images:
        row, group = torch.arange(y0, y1), torch.arange(3 * x0 // 4, (3 * x1 + 3) // 4)
        shapes.append((len(row), len(group)))
        rows.append(row[:, None].expand(shapes[-1]).flatten())
        groups.append(group.expand(shapes[-1]).flatten())
        keys.append((seed & LOW_32, (seed >> 32) & LOW_32))
    lengths = [len(row) for row in rows]
    key = torch.tensor(keys).T.repeat_interleave(torch.tensor(lengths), dim=1)
    zero = torch.zeros(sum(lengths), dtype=torch.int64)
    words = philox((torch.cat(groups), torch.cat(rows), zero, zero), key.unbind())

    u0, u1, u2, u3 = (word.bitwise_right_shift_(9).float().add_(0.5).mul_(2.0**-23) for word in words)
    normals = torch.stack((*_box_muller(u0, u1), *_box_muller(u2, u3)), dim=-1)
    noise = []
    for (_, (_, x0, _, x1)), shape, numbers in zip(images, shapes, normals.split(lengths)):
        first = 3 * x0 % 4
        noise.append(numbers.view(shape[0], 4 * shape[1])[:, first : first + 3 * (x1 - x0)])
    return noise


def _box_muller(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    radius, angle = u.log().mul_(-2).sqrt_(), v * (2 * math.pi)
    return radius * angle.cos(), radius * angle.sin()
