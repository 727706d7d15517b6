"""Distances between two models' attention maps in plain PyTorch, maps in memory: the CPU path, and the tests' oracle.
Maps averaged over heads are computed by it on every device.

Legend: B batch, R rows (queries), M keys, H heads (H_s, H_t where the models differ), D head_dim; S and T student and
teacher scores (B, H, R, M), P their softmax. "mean_kl" averages maps over heads before they are compared:

    p = mean_h P_h (student), t likewise (teacher), both floored at 2^-100 inside the logarithms
    loss  = sum_j t (log t - log p), mean over batch and rows
    dS_h  = P_h (delta_h - t / p) / (B H R),   delta_h = sum_j P_h t / p
"""

from collections.abc import Iterator

import torch
from torch import Tensor

FLOOR = 2.0**-100  # of averaged probabilities, whose logarithm is taken
MAP_BYTES = 2**27  # of the larger model's maps of one slice of the batch; about four such are in memory at a time


def forward(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    student_scale: float,
    teacher_scale: float,
    objective: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and for `backward` both log-sum-exps, (B, H, R); empty for "mse".

    q (B, R, H, D), k (B, M, H, D). objective: "kl" or "mse", head by head, or "mean_kl".
    """
    tensors = student_q, student_k, teacher_q, teacher_k
    slices = [_forward(q, k, tq, tk, student_scale, teacher_scale, objective) for q, k, tq, tk in _slices(*tensors)]
    losses, student_lse, teacher_lse = (torch.cat(parts) for parts in zip(*slices))
    return losses.mean(), student_lse, teacher_lse


def backward(
    dloss: Tensor,
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    student_scale: float,
    teacher_scale: float,
    objective: str,
) -> tuple[Tensor, Tensor]:
    """Gradients for student_q and student_k, contiguous, in their dtype."""
    dq, dk = (x.new_empty(x.shape) for x in (student_q, student_k))
    factor = dloss * student_scale / student_q.shape[:3].numel()
    tensors = student_q, student_k, teacher_q, teacher_k, student_lse, teacher_lse
    for q, k, tq, tk, q_lse, tq_lse, dq_part, dk_part in _slices(*tensors, dq, dk):
        dS = factor * _score_gradient(q, k, tq, tk, q_lse, tq_lse, student_scale, teacher_scale, objective)
        dq_part.copy_(torch.einsum("bhrm,bmhd->brhd", dS, k.to(dS.dtype)))
        dk_part.copy_(torch.einsum("bhrm,brhd->bmhd", dS, q.to(dS.dtype)))
    return dq, dk


def _forward(student_q, student_k, teacher_q, teacher_k, student_scale, teacher_scale, objective):
    """Each image's loss, and both log-sum-exps."""
    S, T = _scores(student_q, student_k, student_scale), _scores(teacher_q, teacher_k, teacher_scale)
    if objective == "mse":
        return (S - T).square().mean((1, 2, 3)), S.new_empty(0), S.new_empty(0)
    lse = S.logsumexp(-1), T.logsumexp(-1)
    log_s, log_t = S - lse[0][..., None], T - lse[1][..., None]
    p_t = log_t.exp()
    if objective == "mean_kl":
        p_t = p_t.mean(1, keepdim=True)
        log_s, log_t = (p.clamp(min=FLOOR).log() for p in (log_s.exp().mean(1, keepdim=True), p_t))
    return (p_t * (log_t - log_s)).sum(-1).mean((1, 2)), *lse


def _score_gradient(
    student_q, student_k, teacher_q, teacher_k, student_lse, teacher_lse, student_scale, teacher_scale, objective
):
    """Derivative of the loss, summed over rows and heads, by the scaled scores of the student."""
    S, T = _scores(student_q, student_k, student_scale), _scores(teacher_q, teacher_k, teacher_scale)
    if objective == "mse":
        return 2.0 / S.shape[3] * (S - T)
    P, P_teacher = (S - student_lse[..., None]).exp(), (T - teacher_lse[..., None]).exp()
    if objective == "kl":
        return P - P_teacher
    p, t = P.mean(1, keepdim=True), P_teacher.mean(1, keepdim=True)
    ratio = torch.where(p >= FLOOR, t / p.clamp(min=FLOOR), 0.0)
    return P * ((P * ratio).sum(-1, keepdim=True) - ratio)


def _slices(student_q: Tensor, student_k: Tensor, teacher_q: Tensor, *others: Tensor) -> Iterator[list[Tensor]]:
    """The tensors, as many images at a time as MAP_BYTES allow."""
    heads = max(student_q.shape[2], teacher_q.shape[2])
    images = max(1, MAP_BYTES // (4 * heads * student_q.shape[1] * student_k.shape[1]))
    for first in range(0, len(student_q), images):
        yield [x[first : first + images] for x in (student_q, student_k, teacher_q, *others)]


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    statistics = torch.promote_types(q.dtype, torch.float32)
    return scale * torch.einsum("brhd,bmhd->bhrm", q.to(statistics), k.to(statistics))
