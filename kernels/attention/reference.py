"""Attention in plain PyTorch: the meaning of the Triton kernels, and the path of what PyTorch has no faster one for.

    S = Q Kᵀ · scale      lse = log Σ_j exp S_ij      P = exp(S - lse)      O = P V
    dV = Pᵀ dO      dS = P ∘ (dO Vᵀ - rowsum(O ∘ dO) + dlse)      dQ = dS K · scale      dK = dSᵀ Q · scale

Half precision is computed in float32, float32 and float64 in their own precision.

Shapes: B batch, N tokens, H heads, D head_dim.
"""

import torch
from torch import Tensor


def attention_forward(
    q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output (B, N, H, D) and lse (B, H, N), in the precision of the computation. S has the bias, (B or 1, H or 1, N,
    keys), added to it."""
    q, k, v = (_by_head(x) for x in (q_BNHD, k_BNHD, v_BNHD))
    p, lse = _probabilities(q, k, scale, bias)
    return (p @ v).transpose(1, 2), lse


def attention_backward(
    grad_out_BNHD: Tensor,
    q_BNHD: Tensor,
    k_BNHD: Tensor,
    v_BNHD: Tensor,
    out_BNHD: Tensor,
    lse_BHN: Tensor,
    scale: float,
    grad_lse_BHN: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, each (B, N, H, D), in the precision of the computation."""
    *grads, _ = attention_bias_backward(
        grad_out_BNHD, q_BNHD, k_BNHD, v_BNHD, None, out_BNHD, lse_BHN, scale, grad_lse_BHN
    )
    return tuple(grads)


def attention_bias_backward(
    grad_out_BNHD: Tensor,
    q_BNHD: Tensor,
    k_BNHD: Tensor,
    v_BNHD: Tensor,
    bias: Tensor | None,
    out_BNHD: Tensor,
    lse_BHN: Tensor,
    scale: float,
    grad_lse_BHN: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, and of S, (B, H, N, keys), which is that of a bias of all."""
    grad_out, q, k, v, out = (_by_head(x) for x in (grad_out_BNHD, q_BNHD, k_BNHD, v_BNHD, out_BNHD))
    p, _ = _probabilities(q, k, scale, bias, lse_BHN)
    delta = (grad_out * out).sum(-1, keepdim=True)
    if grad_lse_BHN is not None:
        delta = delta - grad_lse_BHN.unsqueeze(-1)
    grad_v = p.transpose(-2, -1) @ grad_out
    grad_s = (grad_out @ v.transpose(-2, -1)).sub_(delta).mul_(p)
    grad_q, grad_k = grad_s @ k * scale, grad_s.transpose(-2, -1) @ q * scale
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2), grad_s


def _by_head(x_BNHD: Tensor) -> Tensor:
    x_BHND = x_BNHD.transpose(1, 2)
    return x_BHND if x_BHND.dtype in (torch.float32, torch.float64) else x_BHND.float()


def _probabilities(
    q: Tensor, k: Tensor, scale: float, bias: Tensor | None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    s = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        s += bias
    lse = s.logsumexp(-1) if lse is None else lse
    # A row at -inf throughout attends to nothing.
    shift = lse if bias is None else lse.masked_fill(lse == -torch.inf, torch.inf)
    return s.sub_(shift.unsqueeze(-1)).exp_(), lse
