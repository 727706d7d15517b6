"""One small call of each operation of fastdeit.kernels, forward and backward: odd sizes, so that every kind of edge is
passed."""

from collections.abc import Callable

import torch
from torch import Tensor

import fastdeit.kernels as kernels


class Inputs:
    """Random tensors, the same on every device, rounded to `dtype` and then held in `held` (dtype if None). Those that
    have gradients are in `leaves`."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, held: torch.dtype | None = None):
        self.device, self.dtype, self.held = torch.device(device), dtype, held or dtype
        self.random, self.leaves = torch.Generator().manual_seed(0), list[Tensor]()

    def __call__(self, *shape: int) -> Tensor:
        leaf = self.constant(*shape).requires_grad_()
        self.leaves.append(leaf)
        return leaf

    def constant(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).to(self.dtype).to(self.device, self.held)

    def share(self, *shape: int) -> Tensor:
        """float32 in [0, 1)."""
        return torch.rand(shape, generator=self.random).to(self.device)

    def integers(self, below: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(0, below, shape, generator=self.random, dtype=dtype).to(self.device)


def attention(x: Inputs) -> list[Tensor]:
    packed = [kernels.attention_qkvpacked(x(1, N, 3, 2, D)) for N, D in ((17, 64), (197, 32), (600, 64))]
    apart = [kernels.attention(*(x(1, N, 2, D) for _ in range(3))) for N, D in ((17, 64), (197, 32), (600, 64))]
    return packed + apart


def add_layer_norm(x: Inputs) -> list[Tensor]:
    outputs = []
    for channels in (17, 192, 768):
        vectors = [x(channels) for _ in range(3)]
        outputs += kernels.add_layer_norm(
            x(3, 5, channels), x(3, 5, channels), *vectors[:2], layer_scale=vectors[2], drop_path_scale=x.share(3)
        )
    return outputs


def bias_gelu(x: Inputs) -> list[Tensor]:
    return [kernels.bias_gelu(x(3, 5, channels), x(channels)) for channels in (17, 768)]


def mlp(x: Inputs) -> list[Tensor]:
    return [kernels.mlp(x(3, 23, W), x(4 * W, W), x(4 * W), x(W, 4 * W), x(W)) for W in (64, 192)]


def distillation_loss(x: Inputs) -> list[Tensor]:
    labels = torch.tensor([3, -100, 16], device=x.device)
    return [
        kernels.distillation_loss(
            x(3, 17), x(3, 17), labels, x.constant(3, 17), kind=kind, smoothing=0.1, mix=(labels.flip(0), x.share(3))
        )
        for kind in ("hard", "soft")
    ]


def attention_distillation_loss(x: Inputs) -> list[Tensor]:
    student, teacher = [x(1, 18, 2, 32) for _ in range(2)], [x.constant(1, 18, 2, 64) for _ in range(2)]
    return [kernels.attention_distillation_loss(*student, *teacher)]


def mix_normalize(x: Inputs) -> list[Tensor]:
    outputs = []
    for B, H, W in ((4, 33, 29), (4, 64, 32)):
        box = torch.tensor([[0, 0, 0, 0], [3, 4, 20, 29], [0, 0, H, W], [0, 0, 0, 0]], dtype=torch.int32)
        outputs.append(
            kernels.mix_normalize(
                x.integers(256, B, H, W, 3, dtype=torch.uint8), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2),
                partner=torch.tensor([3, 2, 1, 0], device=x.device), lam=x.share(B), box=box.to(x.device),
                erase_box=box.flip(0).contiguous().to(x.device), erase_seed=x.integers(2**62, B),
            )
        )  # fmt: skip
    return outputs


OPERATIONS: dict[str, Callable[[Inputs], list[Tensor]]] = {
    function.__name__: function
    for function in (
        attention, add_layer_norm, bias_gelu, mlp, distillation_loss, attention_distillation_loss, mix_normalize,
    )
}  # fmt: skip


def call(name: str, x: Inputs) -> list[Tensor]:
    """Outputs, then gradients of their weighted sum, on the CPU in float64."""
    outputs = OPERATIONS[name](x)
    if x.leaves:
        weighted = [(output.double() * weights_like(output)).sum() for output in outputs]
        torch.stack(weighted).sum().backward()
    return [tensor.detach().cpu().double() for tensor in (*outputs, *(leaf.grad for leaf in x.leaves))]


def weights_like(output: Tensor) -> Tensor:
    """Of alternating size, so that no gradient is a sum over what should have been told apart."""
    return (torch.arange(output.numel(), device=output.device) % 7 - 2.5).view(output.shape).double()
