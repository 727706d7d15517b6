"""The optimizer of the DeiT recipes and what it leaves undecayed."""

import torch
from torch import nn

from .command import UserError
from .lamb import Lamb
from .parallel import is_sharded


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: weights with decay; biases, norms, LayerScale, tokens and position embedding without.

    A parameter is left undecayed when it has fewer than two dimensions or when the model's `no_weight_decay()` names
    it. facebookresearch/deit decays `dist_token` (it is missing from the original's list); timm and we do not.
    """
    skip = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    plain = [parameter for name, parameter in named if parameter.ndim <= 1 or name in skip]
    decayed = [parameter for name, parameter in named if not (parameter.ndim <= 1 or name in skip)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def build_optimizer(
    model: nn.Module, name: str, *, lr: float, weight_decay: float, eps: float, betas
) -> torch.optim.Optimizer:
    """AdamW (fused), LAMB (for the DeiT III recipes) or SGD with Nesterov momentum."""
    groups = parameter_groups(model, weight_decay)
    if name == "adamw":
        # fused: one kernel for all parameters, which on the device itself can leave a step out (see update.py).
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    if name == "lamb":
        return Lamb(groups, lr=lr, betas=betas, eps=eps)
    if name == "sgd":
        sharded = is_sharded(groups[0]["params"][0])
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=not sharded)
    raise UserError(f"--opt {name}: choose adamw, lamb or sgd")
