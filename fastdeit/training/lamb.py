"""LAMB: Adam whose step is scaled, tensor by tensor, to the size of the weights (arXiv 1904.00962, algorithm 2).

With g the gradient, clipped to a global norm of `max_grad_norm`, and t the number of steps:

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w
    w = w - lr (|w| / |u|) u     the ratio is 1 where one of the norms is 0, and for parameters without weight decay

This is the variant of apex.optimizers.FusedLAMB and timm.optim.Lamb, which the DeiT III recipes were made with; it is
written here because a step must be left out on the device, without asking the host (optimizer.py, Update).

All but the decay and the ratio is Adam's, so PyTorch's fused Adam does it in one pass over gradients and moments: on
zeros, at a learning rate of 1, it leaves the negative of its step, and `found_inf` leaves it out. Tensors of one shape
lie side by side in the memory of these steps, so that their ratios are applied together.
"""

from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from fastdeit.distributed.parallel import is_sharded, local_shard


class Lamb(torch.optim.Optimizer):
    """`found_inf`, a () float32 tensor on the device, may be set before a step: where it is 1, nothing changes. A
    group's "lr" may be a number or a () float32 tensor on the device."""

    _step_supports_amp_scaling = True  # what PyTorch calls an optimizer that heeds found_inf

    def __init__(
        self, params, *, lr: float, betas=(0.9, 0.999), eps: float = 1e-6, weight_decay=0.0, max_grad_norm=1.0
    ):
        # "fused" has the optimizer's loading keep the count of steps on the parameters' device.
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True})
        self.max_grad_norm = max_grad_norm
        self.found_inf: Tensor | None = None
        self.kept: list[Lists] | None = None

    def load_state_dict(self, state_dict) -> None:
        super().load_state_dict(state_dict)
        self.kept = None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None
        if self.kept is None:
            self.kept = [Lists(group, self.state) for group in self.param_groups]
        sharded = any(is_sharded(lists.params[0]) for lists in self.kept if lists.params)
        grads = [[local_shard(p.grad) for p in lists.params] for lists in self.kept]
        norm = _norms([grad for some in grads for grad in some], sharded).norm()
        divisor = (norm / self.max_grad_norm).clamp(min=1).float()
        hold = torch.zeros_like(divisor) if self.found_inf is None else self.found_inf
        for group, lists, some in zip(self.param_groups, self.kept, grads):
            if some:
                _update(group, lists, some, divisor, hold, sharded)


class Lists:
    """Of one group: the parameters that get gradients, this process's part of them, of their moments and counts; those
    of one shape side by side."""

    def __init__(self, group: dict, state: dict):
        self.params = sorted((p for p in group["params"] if p.grad is not None), key=_shape)
        for p in self.params:
            if not state[p]:
                state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        self.weights = [local_shard(p) for p in self.params]
        self.steps, self.means, self.squares = (
            [local_shard(state[p][key]) for p in self.params] for key in ("step", "exp_avg", "exp_avg_sq")
        )
        self.counts = [len(list(alike)) for _, alike in groupby(self.weights, _shape)]  # of each shape in turn

    def zeros(self) -> tuple[list[Tensor], list[Tensor]]:
        """(a tensor of zeros for each of the weights, the same memory as a matrix for each shape)."""
        tensors: list[Tensor] = []
        matrices: list[Tensor] = []
        for count in self.counts:
            like = self.weights[len(tensors)]
            matrices.append(like.new_zeros(count, like.numel()))
            tensors += [row.as_strided(like.shape, like.stride()) for row in matrices[-1].unbind()]
        return tensors, matrices


def _shape(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.stride()


def _update(group: dict, lists: Lists, grads: list[Tensor], divisor: Tensor, hold: Tensor, sharded: bool) -> None:
    """divisor: () float32, of the gradients."""

    def adam(weights: list[Tensor], rate: float | Tensor) -> None:
        """weights -= rate * Adam's step."""
        torch._fused_adam_(
            weights, grads, lists.means, lists.squares, [], lists.steps, lr=rate, beta1=beta1, beta2=beta2,
            weight_decay=0.0, eps=group["eps"], amsgrad=False, maximize=False, grad_scale=divisor, found_inf=hold,
        )  # fmt: skip

    (beta1, beta2), weight_decay, rate = group["betas"], group["weight_decay"], group["lr"]
    torch._foreach_add_(lists.steps, [1 - hold] * len(lists.steps))  # a tensor that is no list would be read: a number
    if weight_decay == 0:
        adam(lists.weights, rate)
        return
    steps, matrices = lists.zeros()
    adam(steps, 1.0)
    torch._foreach_sub_(steps, lists.weights, alpha=weight_decay)
    before, after = _norms(lists.weights, sharded), _norms(steps, sharded)
    ratios = torch.where((before > 0) & (after > 0), before / after, 1) * (rate * (1 - hold))
    for matrix, some in zip(matrices, ratios.split(lists.counts)):
        matrix.mul_(some[:, None])
    torch._foreach_add_(lists.weights, steps)


def _norms(tensors: list[Tensor], sharded: bool) -> Tensor:
    """(tensors,) float32: the norm of each, over all processes where these hold shares of it."""
    norms = torch.stack(torch._foreach_norm(tensors))
    if not sharded:
        return norms
    squares = norms.square()
    dist.all_reduce(squares)
    return squares.sqrt()
