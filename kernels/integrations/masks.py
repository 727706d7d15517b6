"""The `attn_mask` of scaled_dot_product_attention as the bias of fastdeit.kernels.attention."""

import torch
from torch import Tensor


def fits(mask: Tensor | None, q: Tensor, k: Tensor) -> bool:
    """Whether a mask broadcasts to (batch, heads, queries, keys) of q and k, (batch, tokens, heads, head_dim)."""
    if mask is None:
        return True
    if not 2 <= mask.ndim <= 4 or q.ndim != 4 or k.ndim != 4:
        return False
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return all(n in (1, m) for n, m in zip(mask.shape[::-1], full[::-1]))


def as_bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A bias (1 or batch, 1 or heads, queries, keys), of a mask that fits: True, or a number to add, takes part."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    return mask.expand(-1, -1, q.shape[1], k.shape[1])
