"""mix_normalize in one launch.

    clean_i = (pixels_i - 255 mean) / (255 std), and noise inside erase_box_i
    out_i   = w clean_i + (1 - w) clean_partner          w = lam_i under mixup; 0 inside and 1 outside a cutmix box

Bytes that must move for a sample of n = 3 H W numbers: n read, n read again from the partner where one is mixed in
(mostly from the L2 cache: a tile's samples run side by side), and 2n or 4n written. At 224 pixels into bfloat16 that is
0.3 to 0.6 MB, 0.06 to 0.13 us on an H200 (4.8 TB/s).

A tile is [BLOCK, 4]: groups of four neighbouring columns of a row of interleaved channels. One thread holds a group, so
loads are one 32-bit word, and the four numbers of one Philox call (noise.py) serve exactly one group. Philox runs only
in tiles that touch an erased rectangle's rows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import empty_output

BLOCK = 256  # groups in a tile: 8 numbers a thread; with 16, 143 registers would halve the warps in flight
MAX_GRID_Y = 65535  # CUDA's limit: more tiles, of images above 22 million pixels, go on in the third axis


@triton.jit
def _load_box(box_ptr, i, H, W):
    """The i-th rectangle, clipped to the image."""
    y0, x0 = tl.maximum(tl.load(box_ptr + 4 * i), 0), tl.maximum(tl.load(box_ptr + 4 * i + 1), 0)
    y1, x1 = tl.minimum(tl.load(box_ptr + 4 * i + 2), H), tl.minimum(tl.load(box_ptr + 4 * i + 3), W)
    return y0, x0, y1, x1


@triton.jit
def _uniform(word):
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23


@triton.jit
def _box_muller(u, v):
    """sqrt(-2 ln u) * (cos, sin)(2 pi v), for u and v in (0, 1)."""
    # Quarter turns are taken off exactly; what is left lies within 1/8 turn, where short polynomials (Cephes' sinf and
    # cosf) are right to float32 rounding. The library's cos and sin carry a reduction of huge angles, in local memory.
    quarter = tl.floor(4.0 * v + 0.5)
    a = (4.0 * v - quarter) * 1.5707963267948966
    a2 = a * a
    sin = a + a * a2 * (-1.6666654611e-1 + a2 * (8.3321608736e-3 + a2 * -1.9515295891e-4))
    cos = 1.0 - 0.5 * a2 + a2 * a2 * (4.166664568298827e-2 + a2 * (-1.388731625493765e-3 + a2 * 2.443315711809948e-5))
    q = quarter.to(tl.int32)
    odd = (q & 1) == 1
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    cos, sin = tl.where(((q + 1) & 2) == 2, -cos, cos), tl.where((q & 2) == 2, -sin, sin)
    radius = tl.sqrt(-2.0 * tl.log(u))
    return radius * cos, radius * sin


@triton.jit
def pixel_noise(seed, y, group):
    """Four standard normals for each (y, group): the numbers of noise.pixel_noise."""
    zero = group * 0
    w0, w1, w2, w3 = tl.philox(seed, group, y, zero, zero)
    z0, z1 = _box_muller(_uniform(w0), _uniform(w1))
    z2, z3 = _box_muller(_uniform(w2), _uniform(w3))
    return z0, z1, z2, z3


@triton.jit
def _intersects(y0, x0, y1, x1, tile):
    """Whether a rectangle has pixels, and rows in common with the tile."""
    first_row, last_row = tile
    return (y0 <= last_row) & (y1 > first_row) & (x0 < x1)


@triton.jit
def _inside(y0, x0, y1, x1, y, x):
    return ((y >= y0) & (y < y1))[:, None] & (x >= x0) & (x < x1)


@triton.jit
def _clean(images_ptr, erase_box_ptr, erase_seed_ptr, i, offsets, mask, y, group, x, tile, shift, scale, H, W):
    """Sample i's tile, normalised and erased: [BLOCK, 4] float32."""
    pixels = tl.load(images_ptr + i * (3 * W * H) + offsets, mask=mask, other=0)
    value = (pixels.to(tl.float32) - shift) * scale
    if erase_box_ptr is not None:
        y0, x0, y1, x1 = _load_box(erase_box_ptr, i, H, W)
        if _intersects(y0, x0, y1, x1, tile):
            z0, z1, z2, z3 = pixel_noise(tl.load(erase_seed_ptr + i), y, group)
            lane = tl.arange(0, 4)[None, :]
            noise = tl.where(lane == 0, z0[:, None], z1[:, None])
            noise = tl.where(lane < 2, noise, tl.where(lane == 2, z2[:, None], z3[:, None]))
            value = tl.where(_inside(y0, x0, y1, x1, y, x), noise, value)
    return value


@triton.jit
def _by_channel(channel, red, green, blue):
    blue_or_green = tl.where(channel == 1, tl.cast(green, tl.float32), tl.cast(blue, tl.float32))
    return tl.where(channel == 0, tl.cast(red, tl.float32), blue_or_green)


@triton.jit
def mix_normalize_kernel(
    images_ptr, partner_ptr, lam_ptr, box_ptr, erase_box_ptr, erase_seed_ptr, out_ptr,
    batch, H, shift_r, shift_g, shift_b, scale_r, scale_g, scale_b,
    W: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = (3 * W + 3) // 4  # in a row
    i = tl.program_id(0).to(tl.int64)
    start = (tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)) * BLOCK
    tile = start // GROUPS, (start + BLOCK - 1) // GROUPS  # first and last row
    index = start + tl.arange(0, BLOCK)
    y, group = index // GROUPS, index % GROUPS
    lane = tl.arange(0, 4)[None, :]
    column = 4 * group[:, None] + lane
    x, channel = column // 3, column % 3
    if 3 * W % 4 == 0:
        offsets = 4 * index[:, None] + lane  # rows join without a gap: said like this, loads and stores are words
        mask = (y < H)[:, None]
    else:
        offsets = y[:, None] * (3 * W) + column
        mask = (y < H)[:, None] & (column < 3 * W)
    shift = _by_channel(channel, shift_r, shift_g, shift_b)
    scale = _by_channel(channel, scale_r, scale_g, scale_b)

    value = _clean(images_ptr, erase_box_ptr, erase_seed_ptr, i, offsets, mask, y, group, x, tile, shift, scale, H, W)
    if partner_ptr is not None:
        lam = tl.load(lam_ptr + i)
        weight = tl.full([BLOCK, 4], 0.0, tl.float32) + lam
        mixed = lam != 1.0
        if box_ptr is not None:
            y0, x0, y1, x1 = _load_box(box_ptr, i, H, W)
            if (y0 < y1) & (x0 < x1):
                weight = tl.where(_inside(y0, x0, y1, x1, y, x), 0.0, 1.0)
                mixed = _intersects(y0, x0, y1, x1, tile)
        if mixed:
            partner = tl.load(partner_ptr + i)
            known = (partner >= 0) & (partner < batch)
            j = tl.where(known, partner, i)
            other = _clean(
                images_ptr, erase_box_ptr, erase_seed_ptr, j, offsets, mask, y, group, x, tile, shift, scale, H, W
            )
            value = weight * value + (1.0 - weight) * tl.where(known, other, float("nan"))

    if CHANNELS_LAST:
        out_offsets = offsets
    else:
        out_offsets = (channel * H + y[:, None]) * W + x
    tl.store(out_ptr + i * (3 * W * H) + out_offsets, value.to(out_ptr.dtype.element_ty), mask=mask)


def mix_normalize_triton(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    partner: Tensor | None,
    lam: Tensor | None,
    box: Tensor | None,
    erase_box: Tensor | None,
    erase_seed: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """See api.mix_normalize; the arguments are taken as checked there."""
    B, H, W, _ = images.shape
    assert images.is_contiguous()
    draws = [None if t is None else t.contiguous() for t in (partner, lam, box, erase_box, erase_seed)]
    out = empty_output(images, dtype, channels_last)
    if out.numel() == 0:
        return out
    shift, scale = [255.0 * m for m in mean], [1.0 / (255.0 * s) for s in std]
    tiles = triton.cdiv(H * triton.cdiv(3 * W, 4), BLOCK)
    layers = triton.cdiv(tiles, MAX_GRID_Y)
    # The batch is the fast axis of the grid: a tile's samples, and so its partners, are read side by side.
    with torch.cuda.device_of(images):
        mix_normalize_kernel[(B, triton.cdiv(tiles, layers), layers)](
            images, *draws, out, B, H, *shift, *scale,
            W=W, CHANNELS_LAST=channels_last, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out
