"""Distances between two models' attention maps in plain PyTorch, maps in memory: the CPU path, and the tests' oracle.

Legend: B batch, R rows (queries), M keys, H heads (H_s, H_t where the models differ), D head_dim; S and T student and
teacher scores (B, H, R, M), P their softmax. "mean" averages maps over heads before they are compared.
"""

import torch
from torch import Tensor

FLOOR = 2.0**-100  # of averaged probabilities, whose logarithm is taken


def forward(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    student_scale: float,
    teacher_scale: float,
    objective: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and what `backward` needs: both log-sum-exps and, for "mean_kl", delta; each (B, H, R) or empty.

    q (B, R, H, D), k (B, M, H, D). objective: "kl" or "mse", head by head, or "mean_kl".
    """
    S, T = _scores(student_q, student_k, student_scale), _scores(teacher_q, teacher_k, teacher_scale)
    if objective == "mse":
        return (S - T).square().mean(), *(S.new_empty(0) for _ in range(3))
    student_lse, teacher_lse, delta = S.logsumexp(-1), T.logsumexp(-1), S.new_empty(0)
    if objective == "kl":
        log_s, log_t = S - student_lse[..., None], T - teacher_lse[..., None]
        loss = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    else:
        P = (S - student_lse[..., None]).exp()
        mean_s, mean_t = P.mean(1, keepdim=True), T.softmax(-1).mean(1, keepdim=True)
        loss = (mean_t * (mean_t.clamp(min=FLOOR).log() - mean_s.clamp(min=FLOOR).log())).sum(-1).mean()
        if with_grad:
            delta = (P * _ratio(mean_s, mean_t)).sum(-1)
    return loss, student_lse, teacher_lse, delta


def backward(
    dloss: Tensor,
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    delta: Tensor,
    student_scale: float,
    teacher_scale: float,
    objective: str,
) -> tuple[Tensor, Tensor]:
    """Gradients for student_q and student_k, contiguous, in their dtype."""
    S, T = _scores(student_q, student_k, student_scale), _scores(teacher_q, teacher_k, teacher_scale)
    B, H, R, M = S.shape
    if objective == "mse":
        dS = 2.0 / (B * H * R * M) * (S - T)
    else:
        P, P_teacher = (S - student_lse[..., None]).exp(), (T - teacher_lse[..., None]).exp()
        if objective == "kl":
            dS = (P - P_teacher) / (B * H * R)
        else:
            ratio = _ratio(P.mean(1, keepdim=True), P_teacher.mean(1, keepdim=True))
            dS = P * (delta[..., None] - ratio) / (B * H * R)
    dS = dS * (dloss * student_scale)
    dq = torch.einsum("bhrm,bmhd->brhd", dS, student_k.to(dS.dtype))
    dk = torch.einsum("bhrm,brhd->bmhd", dS, student_q.to(dS.dtype))
    return dq.to(student_q.dtype).contiguous(), dk.to(student_k.dtype).contiguous()


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    statistics = torch.promote_types(q.dtype, torch.float32)
    return scale * torch.einsum("brhd,bmhd->bhrm", q.to(statistics), k.to(statistics))


def _ratio(mean_s: Tensor, mean_t: Tensor) -> Tensor:
    """Minus the derivative of the loss by the student's averaged map; 0 below the floor."""
    return torch.where(mean_s >= FLOOR, mean_t / mean_s.clamp(min=FLOOR), 0.0)
