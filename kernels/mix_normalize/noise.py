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

import torch
from torch import Tensor

ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
LOW_32 = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of int64 tensors that hold 32-bit words; returns four such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two 32-bit words overflows int64's sign only: its 64 bits, and so both halves, are right.
        product0, product2 = c0 * ROUND_MULTIPLIERS[0], c2 * ROUND_MULTIPLIERS[1]
        c0, c1 = (product2 >> 32).bitwise_and_(LOW_32).bitwise_xor_(c1).bitwise_xor_(k0), product2.bitwise_and_(LOW_32)
        c2, c3 = (product0 >> 32).bitwise_and_(LOW_32).bitwise_xor_(c3).bitwise_xor_(k1), product0.bitwise_and_(LOW_32)
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & LOW_32, (k1 + KEY_INCREMENTS[1]) & LOW_32
    return c0, c1, c2, c3


def pixel_noise(seed: int, y0: int, x0: int, y1: int, x1: int, device: torch.device | None = None) -> Tensor:
    """The noise of one image's rectangle, rows y0 to y1 and columns x0 to x1 (ends excluded).

    Returns: (y1 - y0, 3 * (x1 - x0)) float32, channels interleaved.
    """
    first_col, last_col = 3 * x0, 3 * x1
    groups = torch.arange(first_col // 4, (last_col + 3) // 4, device=device)
    rows = torch.arange(y0, y1, device=device)
    shape = (len(rows), len(groups))
    zeros = torch.zeros(shape, dtype=torch.int64, device=device)
    words = philox(
        (groups.expand(shape), rows[:, None].expand(shape), zeros, zeros), (seed & LOW_32, (seed >> 32) & LOW_32)
    )
    u0, u1, u2, u3 = (word.bitwise_right_shift_(9).float().add_(0.5).mul_(2.0**-23) for word in words)
    normals = torch.stack((*_box_muller(u0, u1), *_box_muller(u2, u3)), dim=-1).flatten(1)
    start = first_col - 4 * (first_col // 4)
    return normals[:, start : start + last_col - first_col]


def _box_muller(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    radius, angle = u.log().mul_(-2).sqrt_(), v * (2 * math.pi)
    return radius * angle.cos(), radius * angle.sin()
