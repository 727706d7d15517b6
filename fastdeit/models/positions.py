"""The positions of a smaller grid of patches, from those of a model's own grid: one matrix product.

Each is the mean of the positions around it, weighted by a triangle as wide as the grid is finer: bilinear
interpolation, antialiased, so that every position has its part in every grid and learns from it. (EfficientTrain has a
parameter for each grid in turn, made from the one before by bilinear interpolation: LeapLabTHU/EfficientTrain,
utils_buffer.py update_ckpt.)
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def take_sizes(model, sizes: Iterable[tuple[int, int]]) -> None:
    """Let a DeiT, whose weights are on their device, take images of these smaller sizes (height, width) beside its own,
    with positions interpolated. Parameters and buffers stay what they are. The patch must divide the sizes."""
    patch = model.arch.patch_size
    grids = {size: (size[0] // patch, size[1] // patch) for size in sizes}
    model.regriddings = {
        size: regridding(model.grid_size, grid).to(model.pos_embed.device) for size, grid in grids.items()
    }


def regridding(grid: tuple[int, int], smaller: tuple[int, int]) -> Tensor:
    """(smaller patches, patches) float32: from a position for each patch, row by row, to those of the smaller grid."""
    rows, columns = (_resizing(*sides) for sides in zip(grid, smaller))
    return torch.kron(rows, columns).float()


def _resizing(old: int, new: int) -> Tensor:
    """(new, old) float64."""
    basis = torch.eye(old, dtype=torch.float64)[None, None]
    return F.interpolate(basis, (new, old), mode="bilinear", align_corners=False, antialias=True)[0, 0]


def regridded(pos_embed: Tensor, matrix: Tensor) -> Tensor:
    """(1, prefix + patches, D) -> (1, prefix + smaller patches, D), the prefix as it is; in the type of pos_embed,
    under autocast too. matrix: (smaller patches, patches)"""
    prefix, patches = pos_embed.tensor_split([pos_embed.shape[1] - matrix.shape[1]], dim=1)
    with torch.autocast(pos_embed.device.type, enabled=False):
        return torch.cat([prefix, matrix.to(patches.dtype) @ patches], dim=1)
