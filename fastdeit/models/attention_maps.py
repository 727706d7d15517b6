"""What the class and distillation tokens look at: attention maps, rollout, and pictures of both.

Fused kernels never form the attention matrix, so it is computed here again, block by block, in plain PyTorch.
Shapes: B batch, N tokens, H heads, L depth, T prefix tokens (class, and distillation if there is one).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .deit import DeiT

TOKENS = ("class token", "distillation token")


@torch.no_grad()
def attention_maps(model: DeiT, images: Tensor) -> Tensor:
    """Attention of the prefix tokens to each patch, (B, L, H, T, rows, columns) float32.

    Rows of the softmax: what is missing from a sum of 1 went to the prefix tokens themselves.
    """
    prefix = model.num_prefix_tokens
    maps = [attention_BHNN[:, :, :prefix, prefix:] for attention_BHNN in _attention(model, images)]
    return torch.stack(maps, dim=1).unflatten(-1, model.grid_size)


@torch.no_grad()
def attention_rollout(model: DeiT, images: Tensor) -> Tensor:
    """How much of each patch reaches the prefix tokens through all blocks, (B, T, rows, columns) float32.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (arXiv 2005.00928), section 3.1: the product over
    the blocks of (A + I) / 2, with A the attention averaged over the heads; the I is the residual connection.
    """
    rollout_BNN = None
    for attention_BHNN in _attention(model, images):
        mean_BNN = attention_BHNN.mean(1)
        step_BNN = (mean_BNN + torch.eye(mean_BNN.shape[-1], device=mean_BNN.device)) / 2
        rollout_BNN = step_BNN if rollout_BNN is None else step_BNN @ rollout_BNN
    prefix = model.num_prefix_tokens
    return rollout_BNN[:, :prefix, prefix:].unflatten(-1, model.grid_size)


def _attention(model: DeiT, images: Tensor) -> Iterator[Tensor]:
    """The softmax of each block in turn, (B, H, N, N) float32."""
    assert not model.training, "stochastic depth would drop blocks"
    x_BND = model.embed(images)
    for block in model.blocks:
        qkv = block.attn.qkv(block.norm1(x_BND)).unflatten(-1, (3, block.attn.heads, -1))
        q_BHNK, k_BHNK, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores_BHNN = q_BHNK.float() @ k_BHNK.float().transpose(-1, -2) / q_BHNK.shape[-1] ** 0.5
        yield scores_BHNN.softmax(-1)
        x_BND = block(x_BND)


def titles(model: DeiT) -> list[str]:
    """Of the maps that `looks` gives."""
    tokens = TOKENS[: model.num_prefix_tokens]
    return [f"{token}, {what}" for what in ("last block", "rollout") for token in tokens]


@torch.no_grad()
def looks(model: DeiT, images: Tensor) -> Tensor:
    """Where each prefix token looks in the last block (mean of the heads), then the rollouts: (B, 2T, rows, columns)
    float32, as multiples of each map's mean: from 0.9 to 1.1 nothing stands out."""
    last_BTRC = attention_maps(model, images)[:, -1].mean(1)
    maps_BTRC = torch.cat([last_BTRC, attention_rollout(model, images)], dim=1)
    return maps_BTRC / maps_BTRC.mean((2, 3), keepdim=True)


def overlay(picture: np.ndarray, map_RC: Tensor) -> np.ndarray:
    """The map in colours, from its least to its greatest value, on the picture without its own, which would mix with
    them. picture: (height, width, 3) in [0, 1]; returns the same."""
    from matplotlib import colormaps

    heat = F.interpolate(map_RC[None, None].float(), picture.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
    return 0.35 * picture.mean(-1, keepdims=True) + 0.65 * colormaps["viridis"](heat.cpu().numpy())[..., :3]


def draw_attention(
    model: DeiT,
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    paths: Sequence[Path],
    captions: Sequence[str] | None = None,
) -> None:
    """One PNG an image: the image and the maps of `looks` laid over it, each with its range below.

    images: normalised by mean and std, as the model takes them. captions: what stands above each image, up to two
    lines.
    """
    from matplotlib.figure import Figure

    maps_BTRC = looks(model, images)
    shift, scale = (torch.tensor(value, device=images.device).view(-1, 1, 1) for value in (mean, std))
    pixels = (images.float() * scale + shift).clamp(0, 1).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    for maps_TRC, picture, caption, path in zip(maps_BTRC, pixels, captions or ["image"] * len(paths), paths):
        figure = Figure(figsize=(2.4 * (1 + len(maps_TRC)), 3), layout="constrained")
        axes = figure.subplots(1, 1 + len(maps_TRC))
        for axis in axes:
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
        axes[0].set_title(caption if "\n" in caption else f"{caption}\n", fontsize=9, parse_math=False)
        axes[0].imshow(picture, interpolation="nearest")
        for axis, title, map_RC in zip(axes[1:], titles(model), maps_TRC):
            axis.set_title(title.replace(", ", ",\n"), fontsize=9)
            axis.set_xlabel(f"{map_RC.min():.2g} to {map_RC.max():.2g} x mean", fontsize=8)
            axis.imshow(overlay(picture, map_RC))
        figure.savefig(path, dpi=100)
