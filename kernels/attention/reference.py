"""Attention in plain PyTorch: the meaning of the Triton kernels, and the path of what PyTorch has no faster one for.

    S = Q Kᵀ · scale      lse = log Σ_j exp S_ij      P = exp(S - lse)      O = P V
    dV = Pᵀ dO      dS = P ∘ (dO Vᵀ - rowsum(O ∘ dO) + dlse)      dQ = dS K · scale      dK = dSᵀ Q · scale

Half precision is computed in float32, float32 and float64 in their own precision.

Shapes: B batch, N tokens, H heads, D head_dim.
"""

import torch
from torch import Tensor


def attention_forward(q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output (B, N, H, D) and lse (B, H, N), in the precision of the computation."""
    q, k, v = (_by_head(x) for x in (q_BNHD, k_BNHD, v_BNHD))
    p, lse = _probabilities(q, k, scale)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each (B, N, H, D), in the precision of the computation."""
    grad_out, q, k, v, out = (_by_head(x) for x in (grad_out_BNHD, q_BNHD, k_BNHD, v_BNHD, out_BNHD))
    p, _ = _probabilities(q, k, scale, lse_BHN)
    delta = (grad_out * out).sum(-1, keepdim=True)
    if grad_lse_BHN is not None:
        delta = delta - grad_lse_BHN.unsqueeze(-1)
    grad_v = p.transpose(-2, -1) @ grad_out
    grad_s = (grad_out @ v.transpose(-2, -1)).sub_(delta).mul_(p).mul_(scale)
    grad_q, grad_k = grad_s @ k, grad_s.transpose(-2, -1) @ q
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2)


def _by_head(x_BNHD: Tensor) -> Tensor:
    x_BHND = x_BNHD.transpose(1, 2)
    return x_BHND if x_BHND.dtype in (torch.float32, torch.float64) else x_BHND.float()


def _probabilities(q: Tensor, k: Tensor, scale: float, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    s = (q * scale) @ k.transpose(-2, -1)
    lse = s.logsumexp(-1) if lse is None else lse
    return s.sub_(lse.unsqueeze(-1)).exp_(), lse
