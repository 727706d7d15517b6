"""The two-head loss in plain PyTorch, with its gradients in closed form: the CPU path, and what the tests compare with.

Legend: B samples, C classes, K of them in a cached target; z logits, p softmax(z), q the target's probabilities.
"""

import torch
from torch import Tensor

IGNORE = -100  # the label of an unlabelled sample


def reference(
    cls_logits: Tensor,
    dist_logits: Tensor | None,
    target: Tensor | None,
    second: Tensor | None,
    lam: Tensor | None,
    teacher: Tensor | None,
    teacher_probs: Tensor | None,
    kind: str,
    alpha: float,
    tau: float,
    smoothing: float,
    numel: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns per-sample losses (B,), the two terms unweighted (2, B), and the losses' gradients for both heads.

    Arguments as in `api.distillation_loss`. Statistics are at least float32. A gradient that nobody needs is empty.
    """
    statistics = torch.promote_types(cls_logits.dtype, torch.float32)
    z_cls = cls_logits.to(statistics)
    z_dist = z_cls if dist_logits is None else dist_logits.to(statistics)
    batch, classes = z_cls.shape
    class_weight, teacher_weight = (1.0, 0.0) if kind == "none" else (1.0 - alpha, alpha)
    class_term = teacher_term = z_cls.new_zeros(batch)
    dcls = ddist = None

    if target is not None:
        q = _class_target(z_cls, target, second, lam, smoothing)
        log_p = z_cls.log_softmax(1)
        class_term = _cross_entropy(q, log_p)
        dcls = class_weight * (q.sum(1, keepdim=True) * log_p.exp() - q)
    if kind == "hard" and teacher is not None:
        labels = teacher.argmax(1) if teacher.ndim == 2 else teacher
        log_p = z_dist.log_softmax(1)
        teacher_term = -log_p.gather(1, labels[:, None])[:, 0]
        ddist = teacher_weight * _minus_one_hot(log_p.exp(), labels)
    elif kind == "soft" and teacher is not None:
        scale = tau * tau / classes if numel else tau * tau
        q = (
            (teacher.to(statistics) / tau).softmax(1)
            if teacher_probs is None
            else spread(teacher, teacher_probs, z_dist)
        )
        log_p = (z_dist / tau).log_softmax(1)
        teacher_term = scale * (torch.xlogy(q, q).sum(1) + _cross_entropy(q, log_p))
        ddist = teacher_weight * scale / tau * (log_p.exp() - q)

    losses = class_weight * class_term + teacher_weight * teacher_term
    nothing = cls_logits.new_empty(0)
    if not with_grad:
        return losses, torch.stack((class_term, teacher_term)), nothing, nothing.clone()
    dcls = torch.zeros_like(z_cls) if dcls is None else dcls
    if dist_logits is None and ddist is not None:
        dcls, ddist = dcls + ddist, None
    ddist = nothing if ddist is None else ddist.to(cls_logits.dtype)
    return losses, torch.stack((class_term, teacher_term)), dcls.to(cls_logits.dtype), ddist


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
