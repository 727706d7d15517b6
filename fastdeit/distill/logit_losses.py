"""Teacher terms that look closer at the logits than KL divergence does: DKD, DIST, NKD, and logit standardisation.

All need logits only, so that a logit cache does: `teacher_logits` makes logits of its probabilities. Plain PyTorch on
tensors of the device, in float32 at least; nothing waits for the host.

Legend: B images, C classes; s, t the student's and the teacher's logits; y an image's target class.
"""

import torch
from torch import Tensor

from fastdeit.kernels.distillation_loss.reference import IGNORE, spread
from fastdeit.pipelines import Mix

KINDS = ("dkd", "dist", "nkd")
NONTARGET = {"dkd": 0.5, "nkd": 1.0}  # the weights published for ImageNet, of NKD those for DeiT students
LEAST = 2.0**-25  # what float16 rounds to 0, the probability of a class of which a logit cache says 0


def logit_loss(kind: str, s_BC: Tensor, t_BC: Tensor, target_B: Tensor, *, tau: float, nontarget: float) -> Tensor:
    """() the teacher term of a kind of KINDS. target_B: int64, which dist does not read."""
    if kind == "dist":
        return dist(s_BC, t_BC, tau=tau)
    return {"dkd": dkd, "nkd": nkd}[kind](s_BC, t_BC, target_B, tau=tau, nontarget=nontarget)


def dkd(s_BC: Tensor, t_BC: Tensor, target_B: Tensor, *, tau: float = 1.0, nontarget: float = 0.5) -> Tensor:
    """Decoupled knowledge distillation, () mean over B:

        tau^2 (KL of [p(y), 1 - p(y)] + nontarget * KL of p(i) / (1 - p(y)) over i != y),  p = softmax(. / tau)

    `nontarget` 1 - p_t(y) would make it the KL divergence of all classes. Source: arXiv 2203.08679;
    megvii-research/mdistiller distillers/DKD.py, whose configs/imagenet have tau 1 and beta, which is `nontarget`, 0.5
    (ResNet-34 to ResNet-18) or 2 (ResNet-50 to MobileNetV1).
    """
    (s_at, s_off, s_others), (t_at, t_off, t_others) = (_decoupled(x / tau, target_B) for x in (s_BC, t_BC))
    target = t_at.exp() * (t_at - s_at) + t_off.exp() * (t_off - s_off)
    others = _off_target(t_others.exp() * (t_others - s_others), target_B).sum(1)
    return tau * tau * (target + nontarget * others).mean()


def nkd(s_BC: Tensor, t_BC: Tensor, target_B: Tensor, *, tau: float = 1.0, nontarget: float = 1.0) -> Tensor:
    """Normalised knowledge distillation, () mean over B:

        - p_t(y) log p_s(y) - nontarget * tau^2 * sum over i != y of n_t(i) log n_s(i)
        p = softmax(.),  n = softmax(. / tau) over the classes other than y

    Source: arXiv 2303.13005; yzd-v/cls_KD losses/nkd.py, whose configs have tau 1 and gamma, which is
    `nontarget`, 1 for DeiT students and 1.5 for ResNet-18.
    """
    at = target_B[:, None]
    target = -(t_BC.softmax(1).gather(1, at) * s_BC.log_softmax(1).gather(1, at))[:, 0]
    (*_, s_others), (*_, t_others) = (_decoupled(x / tau, target_B) for x in (s_BC, t_BC))
    others = -_off_target(t_others.exp() * s_others, target_B).sum(1)
    return (target + nontarget * tau * tau * others).mean()


def dist(s_BC: Tensor, t_BC: Tensor, *, tau: float = 1.0) -> Tensor:
    """DIST, (): 2 tau^2 (1 - mean correlation over an image's classes + 1 - mean correlation over a class's images).

    Pearson's correlation of student and teacher, of softmax(. / tau); the second sees no images but these B. Source:
    arXiv 2205.10536; hunto/image_classification_sota losses/dist_kd.py; the 2, of ImageNet, from
    yoshitomo-matsubara/torchdistill configs/sample/ilsvrc2012/dist.
    """
    s_BC, t_BC = ((x / tau).softmax(1) for x in (s_BC, t_BC))
    return 2 * tau * tau * (2 - _correlation(s_BC, t_BC, 1).mean() - _correlation(s_BC, t_BC, 0).mean())


def standardized(x_BC: Tensor) -> Tensor:
    """(z - mean) / standard deviation, over each image's classes. Source: arXiv 2403.01427, algorithm 1;
    sunshangquan/logit-standardization-KD distillers/KD.py (deviation with C - 1 degrees of freedom, plus 1e-7)."""
    x_BC = _floats(x_BC)
    return (x_BC - x_BC.mean(1, keepdim=True)) / (x_BC.std(1, keepdim=True) + 1e-7)


def teacher_logits(teacher, like_BC: Tensor, tau: float) -> Tensor:
    """(B, C) logits, at least float32. Those of a live teacher as they are; of a logit cache's (classes, probabilities)
    at temperature `tau`, (B, K) each, they are tau log p: the teacher's up to a constant for each image, which no loss
    here sees, if K = C. What the K leave of the probability is spread evenly over the other classes."""
    if not isinstance(teacher, tuple):
        return _floats(teacher)
    return tau * spread(*teacher, _floats(like_BC)).clamp(min=LEAST).log()


def target_class(labels_B: Tensor, mix: Mix | None, t_BC: Tensor) -> Tensor:
    """(B,) int64: the label; of a mixed image that of the larger weight (of equal ones its own), as in cls_KD's nkd.py;
    where that is missing, the teacher's most probable class."""
    if mix is not None:
        labels_B = torch.where(mix.lam >= 0.5, labels_B, labels_B[mix.partner])
    return torch.where(labels_B == IGNORE, t_BC.argmax(1), labels_B)


def _decoupled(x_BC: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of softmax(x): (log p(y) (B,), log (1 - p(y)) (B,), log p(i) / (1 - p(y)) (B, C), at y without meaning)."""
    log_p = x_BC.log_softmax(1)
    off = log_p.scatter(1, target_B[:, None], -torch.inf).logsumexp(1)  # not log(1 - p), which cancels
    return log_p.gather(1, target_B[:, None])[:, 0], off, log_p - off[:, None]


def _off_target(x_BC: Tensor, target_B: Tensor) -> Tensor:
    return x_BC.scatter(1, target_B[:, None], 0.0)


def _correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    a, b = (x - x.mean(dim, keepdim=True) for x in (a, b))
    return (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + 1e-8)


def _floats(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
