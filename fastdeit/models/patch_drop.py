"""Patch dropout: while it trains, a model sees some patches of each image only, others in each step, and all prefix
tokens (arXiv 2208.07220; timm's PatchDropout, whose rounding this is).

A DeiT is given the patches that stay. timm's models that have the layer draw for themselves, with PyTorch's generator.
"""

from torch import Tensor, nn


def number_kept(patches: int, rate: float) -> int:
    return max(1, int(patches * (1 - rate)))


def chosen(noise_BP: Tensor, rate: float) -> Tensor:
    """(B, kept) int64: of each image the places of the patches with the least noise, which is uniform, (B, patches)."""
    order = noise_BP.argsort(dim=1, stable=True)
    return order[:, : number_kept(noise_BP.shape[1], rate)].contiguous()  # as its copy for a CUDA graph is


def has_layer(model: nn.Module) -> bool:
    return bool(_layers(model))


def set_rate(model: nn.Module, rate: float) -> None:
    """Of a model of timm's."""
    for layer in _layers(model):
        layer.prob = rate


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.startswith("PatchDropout")]
