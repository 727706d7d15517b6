"""Muon for the matrices inside a network, AdamW for everything else.

With g the gradient of a matrix of m x n and M its average:

    M = 0.95 M + 0.05 g                u = 0.05 g + 0.95 M (Nesterov)
    w = w - lr (0.2 sqrt(max(m, n)) O + weight_decay w)      O = U V^T for the singular value decomposition u = U S V^T

O is approximated by five Newton-Schulz iterations, which are nothing but matrix products: of X, at first u / |u|,

    X = a X + (b A + c A^2) X, A = X X^T, (a, b, c) = (3.4445, -4.7750, 2.0315)

and bring a singular value between 0.002 and 1 to between 0.68 and 1.21 (Keller Jordan,
kellerjordan.github.io/posts/muon). The factor 0.2 sqrt(max(m, n)) makes O as large as a step of AdamW's, whose learning
rate and weight decay can be used as they are (arXiv 2502.16982, section 2.2; "match_rms_adamw" of torch.optim.Muon,
whose arithmetic this is). Queries, keys and values are three matrices, also where one layer computes them (Jordan's
advice).

It is written here because torch.optim.Muon reads the learning rate on the host, cannot leave a step out on the device
(optimizer.py, Update), and has a launch for every product of every matrix; here those of one shape are multiplied
together. Nothing waits for the host.
"""

from itertools import chain

import torch
from torch import Tensor

from fastdeit.distributed.parallel import full, local_shard, own_part

MOMENTUM = 0.95
ITERATIONS, COEFFICIENTS, EPSILON = 5, (3.4445, -4.7750, 2.0315), 1e-7
RMS_OF_ADAMW = 0.2


class Muon(torch.optim.Optimizer):
    """Groups with "matrices" (how many of equal height one parameter holds, one below the other: 1, or 3 for qkv) are
    Muon's, the others AdamW's, to which betas and eps belong. As Lamb it heeds `found_inf`, a () float32 tensor on the
    device: where it is 1, nothing changes. A group's "lr" may be a number or a () float32 tensor on the device.

    precision: of the iterations; None for bfloat16 on a GPU, as everywhere, and float32 on a CPU, which is faster at
    that. Of FSDP's shards each process gathers the whole and does the same.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self, params, *, lr: float, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay=0.0,
        precision: torch.dtype | None = None,
    ):  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "matrices": 0, "fused": True}
        super().__init__(params, defaults)
        self.precision = precision
        self.found_inf: Tensor | None = None
        for group in self.param_groups:
            for p in group["params"]:
                zeros = ("momentum_buffer",) if group["matrices"] else ("exp_avg", "exp_avg_sq")
                self.state[p] = {key: torch.zeros_like(p) for key in zeros}
                if not group["matrices"]:
                    self.state[p]["step"] = torch.zeros((), device=p.device)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None
        learning = [{**g, "params": [p for p in g["params"] if p.grad is not None]} for g in self.param_groups]
        if not (groups := [group for group in learning if group["params"]]):
            return
        hold = self.found_inf
        if hold is None:
            hold = torch.zeros((), device=groups[0]["params"][0].device)
        for group in groups:
            if not group["matrices"]:
                self._adamw(group, hold)
        if groups := [group for group in groups if group["matrices"]]:
            self._muon(groups, hold)

    def _adamw(self, group: dict, hold: Tensor) -> None:
        params = group["params"]
        means, squares, steps = (
            [local_shard(self.state[p][key]) for p in params] for key in ("exp_avg", "exp_avg_sq", "step")
        )
        torch._foreach_add_(steps, [1 - hold] * len(steps))
        torch._fused_adamw_(
            [local_shard(p) for p in params], [local_shard(p.grad) for p in params], means, squares, [], steps,
            lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"],
            eps=group["eps"], amsgrad=False, maximize=False, found_inf=hold,
        )  # fmt: skip

    def _muon(self, groups: list[dict], hold: Tensor) -> None:
        params = list(chain.from_iterable(group["params"] for group in groups))
        averages = [self.state[p]["momentum_buffer"] for p in params]
        # SGD's fused kernel as in Update._average: average -= (MOMENTUM - 1) * (gradient - average).
        rate = hold.new_full((), MOMENTUM - 1)
        _sgd([local_shard(a) for a in averages], [local_shard(p.grad) for p in params], rate, -1.0, hold)
        towards = [full(torch.lerp(p.grad, average, MOMENTUM)) for p, average in zip(params, averages)]
        parts = [group["matrices"] for group in groups for _ in group["params"]]
        made = iter(self._orthogonal(towards, parts))
        for group in groups:
            steps = [own_part(next(made), p) for p in group["params"]]
            _sgd([local_shard(p) for p in group["params"]], steps, group["lr"], group["weight_decay"], hold)

    def _orthogonal(self, towards: list[Tensor], parts: list[int]) -> list[Tensor]:
        """For each of `towards`, (parts * m, n), the step in the same shape and type."""
        by_shape: dict[tuple, list[Tensor]] = {}
        for tensor, count in zip(towards, parts):
            for matrix in tensor.chunk(count):
                by_shape.setdefault(tuple(matrix.shape), []).append(matrix)
        made = {}
        for (m, n), matrices in by_shape.items():
            stacked = torch.stack(matrices)
            steps = orthogonalise(stacked.to(self.precision or _precision(stacked)))
            steps = torch.empty_like(stacked).copy_(steps)  # in the weights' type and strides
            made[m, n] = iter(steps.mul_(RMS_OF_ADAMW * max(m, n) ** 0.5).unbind())
        steps = []
        for tensor, count in zip(towards, parts):
            shape = (tensor.shape[0] // count, tensor.shape[1])
            found = [next(made[shape]) for _ in range(count)]
            steps.append(found[0] if count == 1 else torch.cat(found))
        return steps


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly (above): (batch, m, n) -> (batch, m, n), in the type given."""
    m, n = matrices.shape[-2:]
    x = matrices.mT if m > n else matrices  # the products are of the shorter side
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if m > n else x


def _precision(tensor: Tensor) -> torch.dtype:
    return torch.bfloat16 if tensor.is_cuda else tensor.dtype


def _sgd(weights: list[Tensor], steps: list[Tensor], rate: float | Tensor, weight_decay: float, hold: Tensor) -> None:
    """weights -= rate * (steps + weight_decay * weights), in one launch and unless held."""
    torch._fused_sgd_(
        weights, steps, [], weight_decay=weight_decay, momentum=0.0, lr=rate, dampening=0.0, nesterov=False,
        maximize=False, is_first_step=False, found_inf=hold,
    )  # fmt: skip
