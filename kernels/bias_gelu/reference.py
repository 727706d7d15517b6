"""bias_gelu in plain PyTorch: the CPU path, and the oracle of the tests. Half precision is computed in float32."""

import torch
from torch import Tensor
from torch.nn import functional as F


def _wide(tensor: Tensor) -> Tensor:
    """Contiguous, so that sums go in one order whatever the strides were."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias), of x's dtype, contiguous."""
    return F.gelu(_wide(x) + _wide(bias)).to(x.dtype)


def bias_gelu_backward_reference(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias."""
    dx = torch.ops.aten.gelu_backward(_wide(grad), _wide(x) + _wide(bias))
    return dx.to(x.dtype), dx.flatten(0, -2).sum(0).to(bias.dtype)
