"""The two-head loss in plain PyTorch, with its gradients in closed form: the CPU path, and what the tests compare with.

Legend: B samples, C classes, K of them in a cached target; z logits, p softmax(z), q the target's probabilities.
"""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100  # the label of an unlabelled sample
# What the kernels keep of a sample for backward: z's maximum and Q / sum; x's, then the teacher's, maximum and 1 / sum;
# the teacher's first argmax. The functions here compute it again.
STATISTICS = 7


class Arguments(NamedTuple):
    """What the loss is computed from, checked and in the order of the operators (api.ARGUMENTS).

    second, lam: of mixup or cutmix, both or neither. teacher: (B, C) logits, (B,) labels or (B, K) classes with their
    teacher_probs. numel: divide the soft term by C too.
    """

    cls_logits: Tensor
    dist_logits: Tensor | None
    target: Tensor | None
    second: Tensor | None
    lam: Tensor | None
    teacher: Tensor | None
    teacher_probs: Tensor | None
    kind: str
    alpha: float
    tau: float
    smoothing: float
    numel: bool


def forward(given: Arguments) -> tuple[Tensor, Tensor]:
    """Returns per-sample losses (B,) and the two terms unweighted (2, B)."""
    cls_logits, dist_logits, target, second, lam, teacher, teacher_probs, kind, alpha, tau, smoothing, numel = given
    z_cls, z_dist = _wide(cls_logits, dist_logits)
    class_weight, teacher_weight = _weights(kind, alpha)
    class_term = teacher_term = z_cls.new_zeros(len(z_cls))
    if target is not None:
        q = _class_target(z_cls, target, second, lam, smoothing)
        class_term = _cross_entropy(q, z_cls.log_softmax(1))
    if kind == "hard" and teacher is not None:
        teacher_term = -z_dist.log_softmax(1).gather(1, _labels(teacher)[:, None])[:, 0]
    elif kind == "soft" and teacher is not None:
        q = _teacher_probabilities(teacher, teacher_probs, z_dist, tau)
        entropy = torch.xlogy(q, q).sum(1)
        teacher_term = _soft_scale(z_dist, tau, numel) * (entropy + _cross_entropy(q, (z_dist / tau).log_softmax(1)))
    return class_weight * class_term + teacher_weight * teacher_term, torch.stack((class_term, teacher_term))


def backward(dlosses: Tensor, given: Arguments) -> tuple[Tensor, Tensor]:
    """The gradients of both heads' logits, in their dtype; the second is empty where there is one head."""
    cls_logits, dist_logits, target, second, lam, teacher, teacher_probs, kind, alpha, tau, smoothing, numel = given
    z_cls, z_dist = _wide(cls_logits, dist_logits)
    class_weight, teacher_weight = _weights(kind, alpha)
    dcls = ddist = torch.zeros_like(z_cls)
    if target is not None:
        q = _class_target(z_cls, target, second, lam, smoothing)
        dcls = class_weight * (q.sum(1, keepdim=True) * z_cls.softmax(1) - q)
    if kind == "hard" and teacher is not None:
        ddist = teacher_weight * _minus_one_hot(z_dist.softmax(1), _labels(teacher))
    elif kind == "soft" and teacher is not None:
        q = _teacher_probabilities(teacher, teacher_probs, z_dist, tau)
        ddist = teacher_weight * _soft_scale(z_dist, tau, numel) / tau * ((z_dist / tau).softmax(1) - q)
    scale = dlosses[:, None]
    if dist_logits is None:
        return (scale * (dcls + ddist)).to(cls_logits.dtype), cls_logits.new_empty(0)
    return (scale * dcls).to(cls_logits.dtype), (scale * ddist).to(cls_logits.dtype)


def _wide(cls_logits: Tensor, dist_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """The logits of the class head, and of the head that hears the teacher."""
    statistics = torch.promote_types(cls_logits.dtype, torch.float32)
    z_cls = cls_logits.to(statistics)
    return z_cls, z_cls if dist_logits is None else dist_logits.to(statistics)


def _weights(kind: str, alpha: float) -> tuple[float, float]:
    return (1.0, 0.0) if kind == "none" else (1.0 - alpha, alpha)


def _labels(teacher: Tensor) -> Tensor:
    return teacher.argmax(1) if teacher.ndim == 2 else teacher


def _soft_scale(z: Tensor, tau: float, numel: bool) -> float:
    return tau * tau / z.shape[1] if numel else tau * tau


def _teacher_probabilities(teacher: Tensor, probs: Tensor | None, z: Tensor, tau: float) -> Tensor:
    return (teacher.to(z.dtype) / tau).softmax(1) if probs is None else spread(teacher, probs, z)


def _class_target(z: Tensor, target: Tensor, second: Tensor | None, lam: Tensor | None, smoothing: float) -> Tensor:
    """q = (1-smoothing) * (lam * e_a + (1-lam) * e_b) + smoothing / C; all zero for an unlabelled sample."""
    classes = z.shape[1]
    if target.ndim == 2:
        return (1.0 - smoothing) * target.to(z.dtype) + smoothing / classes
    lam = z.new_ones(z.shape[0]) if lam is None else lam.to(z.dtype)
    second = target if second is None else second
    # A label is missed only where it carries weight: lam 1 leaves nothing of the partner.
    labelled = ((target != IGNORE) | (lam == 0)) & ((second != IGNORE) | (lam == 1))
    q = torch.zeros_like(z)
    q.scatter_add_(1, target.clamp(min=0)[:, None], lam[:, None])
    q.scatter_add_(1, second.clamp(min=0)[:, None], (1.0 - lam)[:, None])
    q = (1.0 - smoothing) * q + smoothing / classes
    return q * labelled[:, None]


def spread(indices: Tensor, probs: Tensor, like: Tensor) -> Tensor:
    """Dense (B, C) distribution of K cached probabilities, what they leave over spread evenly over the other classes.

    Probabilities that were rounded to sum to more than 1, or that name every class, are scaled to sum to 1.
    """
    probs = probs.to(like.dtype)
    total = probs.sum(1, keepdim=True)
    others = like.shape[1] - indices.shape[1]
    probs = probs / (total.clamp(min=1.0) if others else total)
    rest = (1.0 - total).clamp(min=0.0) / max(others, 1)
    return rest.expand_as(like).scatter(1, indices, probs)


def _cross_entropy(q: Tensor, log_p: Tensor) -> Tensor:
    return -torch.where(q > 0, q * log_p, 0.0).sum(1)


def _minus_one_hot(p: Tensor, labels: Tensor) -> Tensor:
    return p.scatter_add(1, labels[:, None], p.new_full((), -1.0).expand(len(labels), 1))
