"""Attention on the CPU as PyTorch itself computes it fastest: with the operators behind scaled_dot_product_attention.

Measured on one x86 core at 198 and 578 tokens beside the plain formulas of `reference`: forward 1.2 to 2.7 times as
fast, backward 1.9 times in float32 but 0.4 to 0.9 in half precision, which therefore takes the formulas, as do float64
and a gradient of lse. Both keep lse as a natural log, so either backward fits either forward.
"""

import torch
from torch import Tensor

from fastdeit.kernels.backend import readable

from . import reference


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type != "cpu" or q.dtype == torch.float64:
        return reference.attention_forward(q, k, v, scale)
    q, k, v = (readable(x).transpose(1, 2) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return out.transpose(1, 2), lse


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, grad_lse: Tensor | None
) -> tuple[Tensor, ...]:
    if q.device.type != "cpu" or q.dtype != torch.float32 or grad_lse is not None:
        return reference.attention_backward(grad_out, q, k, v, out, lse, scale, grad_lse)
    grad_out, q, k, v, out = (readable(x).transpose(1, 2) for x in (grad_out, q, k, v, out))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, False, scale=scale
    )
    return tuple(grad.transpose(1, 2) for grad in grads)
