"""LAMB: Adam whose step is scaled, tensor by tensor, to the size of the weights (arXiv 1904.00962, algorithm 2).

With g the gradient, clipped to a global norm of `max_grad_norm`, and t the number of steps:

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w
    w = w - lr (|w| / |u|) u     the ratio is 1 where one of the norms is 0, and for parameters without weight decay

This is the variant of apex.optimizers.FusedLAMB and timm.optim.Lamb, which the DeiT III recipes were made with; it is
written here because a step must be left out on the device, without asking the host (optimizer.py, Update).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fastdeit.distributed.parallel import is_sharded, local_shard


class Lamb(torch.optim.Optimizer):
    """`found_inf`, a () float32 tensor on the device, may be set before a step: where it is 1, nothing changes."""

    _step_supports_amp_scaling = True  # what PyTorch calls an optimizer that heeds found_inf

    def __init__(
        self, params, *, lr: float, betas=(0.9, 0.999), eps: float = 1e-6, weight_decay=0.0, max_grad_norm=1.0
    ):
        # "fused" has the optimizer's loading keep the count of steps on the parameters' device.
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True})
        self.max_grad_norm = max_grad_norm
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None
        groups = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        sharded = any(is_sharded(p) for params in groups for p in params)
        hold = self.found_inf
        grads = [local_shard(p.grad) for params in groups for p in params]
        if hold is not None:
            for grad in grads:
                grad.masked_fill_(hold > 0, 0)  # 0 times nan is nan
        keep = torch.ones((), device=grads[0].device) if hold is None else 1 - hold
        clip = (self.max_grad_norm / _norms(grads, sharded).norm()).clamp(max=1)
        torch._foreach_mul_(grads, clip)
        for group, params in zip(self.param_groups, groups):
            if params:
                self._update(group, params, keep, sharded)

    def _update(self, group: dict, params: list[Tensor], keep: Tensor, sharded: bool) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), device=keep.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        (beta1, beta2), weight_decay = group["betas"], group["weight_decay"]
        weights, grads = [local_shard(p) for p in params], [local_shard(p.grad) for p in params]
        steps, means, squares = (
            [local_shard(self.state[p][key]) for p in params] for key in ("step", "exp_avg", "exp_avg_sq")
        )
        torch._foreach_add_(steps, keep)
        _approach(means, grads, (1 - beta1) * keep)
        _approach(squares, torch._foreach_mul(grads, grads), (1 - beta2) * keep)

        count = steps[0].double().clamp(min=1)  # 0 where the very first step is left out
        updates = torch._foreach_div(means, 1 - beta1**count)
        scales = torch._foreach_div(squares, 1 - beta2**count)
        torch._foreach_sqrt_(scales)
        torch._foreach_add_(scales, group["eps"])
        torch._foreach_div_(updates, scales)
        rate = group["lr"] * keep
        if weight_decay == 0:
            torch._foreach_mul_(updates, rate)
        else:
            torch._foreach_add_(updates, weights, alpha=weight_decay)
            before, after = _norms(weights, sharded), _norms(updates, sharded)
            ratios = torch.where((before > 0) & (after > 0), before / after, 1)
            torch._foreach_mul_(updates, list((rate * ratios).unbind()))
        torch._foreach_sub_(weights, updates)


def _approach(averages: list[Tensor], values: list[Tensor], weight: Tensor) -> None:
    """averages += weight * (values - averages)"""
    differences = torch._foreach_sub(values, averages)
    torch._foreach_mul_(differences, weight)
    torch._foreach_add_(averages, differences)


def _norms(tensors: list[Tensor], sharded: bool) -> Tensor:
    """(tensors,) float32: the norm of each, over all processes where these hold shares of it."""
    norms = torch.stack(torch._foreach_norm(tensors))
    if not sharded:
        return norms
    squares = norms.square()
    dist.all_reduce(squares)
    return squares.sqrt()
