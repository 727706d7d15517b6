"""mlp in plain PyTorch: the CPU path, and the oracle of the tests. Half precision is computed in float32."""

import torch
from torch import Tensor
from torch.nn import functional as F


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def mlp_reference(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """x: (rows, width)."""
    x, weight1, bias1, weight2, bias2, dtype = *map(_wide, (x, weight1, bias1, weight2, bias2)), x.dtype
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2).to(dtype)


def mlp_backward_reference(
    grad: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of x; the hidden state and its gradient before the GELU, (rows, hidden); the gradient of bias1."""
    wide_weight1 = _wide(weight1)
    t = F.linear(_wide(x), wide_weight1, _wide(bias1))
    dt = torch.ops.aten.gelu_backward(_wide(grad) @ _wide(weight2), t)
    dx = dt @ wide_weight1
    return dx.to(x.dtype), F.gelu(t).to(x.dtype), dt.to(x.dtype), dt.sum(0).to(bias1.dtype)
