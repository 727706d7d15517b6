"""The loss of a student with a class head and a distillation head in one launch, both gradients in another."""

from typing import Literal, overload

import torch
from torch import Tensor

from fastdeit.kernels.autograd import differentiable, only_once
from fastdeit.kernels.backend import use_triton

from . import checks, reference


@overload
def distillation_loss(
    cls_logits: Tensor,
    dist_logits: Tensor | None,
    target: Tensor | None,
    teacher: Tensor | tuple[Tensor, Tensor] | None,
    *,
    kind: str,
    alpha: float = 0.5,
    tau: float = 1.0,
    smoothing: float = 0.0,
    mix: tuple[Tensor, float | Tensor] | None = None,
    soft_reduction: str = "batchmean",
    reduction: str = "mean",
    return_terms: Literal[False] = False,
) -> Tensor: ...
@overload
def distillation_loss(
    cls_logits: Tensor,
    dist_logits: Tensor | None,
    target: Tensor | None,
    teacher: Tensor | tuple[Tensor, Tensor] | None,
    *,
    kind: str,
    alpha: float = 0.5,
    tau: float = 1.0,
    smoothing: float = 0.0,
    mix: tuple[Tensor, float | Tensor] | None = None,
    soft_reduction: str = "batchmean",
    reduction: str = "mean",
    return_terms: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def distillation_loss(
    cls_logits: Tensor,
    dist_logits: Tensor | None,
    target: Tensor | None,
    teacher: Tensor | tuple[Tensor, Tensor] | None,
    *,
    kind: str,
    alpha: float = 0.5,
    tau: float = 1.0,
    smoothing: float = 0.0,
    mix: tuple[Tensor, float | Tensor] | None = None,
    soft_reduction: str = "batchmean",
    reduction: str = "mean",
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of the class head plus the teacher's term of the distillation head.

    Each sample's loss is `(1 - alpha) * class term + alpha * teacher term`, or the class term alone with kind "none"::

        class term    CE(q, softmax(cls_logits)),  q = (1 - smoothing) * (lam * e_a + (1 - lam) * e_b) + smoothing / C
        "hard"        CE(argmax of the teacher, softmax(dist_logits)), the first class among equals; not smoothed
        "soft"        tau^2 * KL(softmax(teacher / tau) || softmax(dist_logits / tau))

    Statistics and losses are float32 whatever the logits' dtype; gradients have that dtype, and are rounded to it once,
    after the incoming gradient has multiplied them. They cannot be differentiated again. Up to 32,768 classes.

    Args:
        cls_logits: (B, C) float32, float16 or bfloat16 (on the CPU also float64); last dimension contiguous.
        dist_logits: (B, C) like `cls_logits`; None for a student with one head, which then carries both terms.
        target: (B,) int64 labels, -100 for an unlabelled sample; or (B, C) probabilities; or None: no sample has one.
            An unlabelled sample has class term 0 and counts in the mean.
        teacher: what the teacher says of the batch. Its logits (B, C), in any of the dtypes; or, for kind "hard", its
            labels (B,) int64; or cached targets `(indices, probabilities)`, (B, K) int64 and (B, K) floating, indices
            of a row distinct, probabilities already at temperature `tau`: what they leave to 1 is spread evenly over
            the other classes. None with kind "none".
        kind: "none", "hard" or "soft".
        alpha: weight of the teacher term, in [0, 1].
        tau: temperature of the soft term.
        smoothing: label smoothing of the class term, in [0, 1).
        mix: `(second_labels, lam)` of mixup or cutmix: (B,) int64, and the weight of the sample's own label as a float
            or a (B,) float32 tensor. Under torch.compile give a tensor: each new float would recompile. A sample
            is unlabelled where a label that carries weight is -100.
        soft_reduction: "batchmean", or "numel", which divides the soft term by C as well, as the DeiT code does.
        reduction: "mean" over all B samples, or "none": (B,) float32.
        return_terms: also return a detached float32 tensor of 2, the class and the teacher term, unweighted, each
            averaged over all B samples: `loss == (1 - alpha) * terms[0] + alpha * terms[1]`.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; on the CPU also for labels out of range. On a GPU a
            label out of range makes its sample's loss and gradient NaN, since checking it would stop the stream.

    Source: DeiT (arXiv 2012.12877, section 4, equations 2 and 3; facebookresearch/deit, losses.py). Cached targets:
    TinyViT (arXiv 2207.10666, section 3.2).
    """
    checks.check_options(kind, alpha, tau, smoothing, soft_reduction, reduction)
    checks.check_logits(cls_logits, dist_logits)
    checks.check_target(cls_logits, target, mix)
    checks.check_teacher(cls_logits, teacher, kind)

    if kind == "none":
        dist_logits = teacher = None
    probs = None
    if isinstance(teacher, tuple):
        teacher, probs = teacher
        if kind == "hard":
            teacher, probs = teacher.gather(1, probs.argmax(1, keepdim=True))[:, 0], None
    second = lam = None
    if mix is not None:
        second, lam = mix
        if not isinstance(lam, Tensor):
            lam = torch.full((len(cls_logits),), float(lam), device=cls_logits.device)

    losses, terms, _ = _apply(
        cls_logits, dist_logits, target, second, lam, teacher, probs,
        kind, alpha, tau, smoothing, soft_reduction == "numel",
    )  # fmt: skip
    loss = losses.mean() if reduction == "mean" else losses
    return (loss, terms.mean(1)) if return_terms else loss


ARGUMENTS = (  # reference.Arguments
    "Tensor cls_logits, Tensor? dist_logits, Tensor? target, Tensor? second, Tensor? lam, Tensor? teacher, "
    "Tensor? teacher_probs, str kind, float alpha, float tau, float smoothing, bool numel"
)


@torch.library.custom_op(
    "fastdeit::distillation_loss", mutates_args=(), schema=f"({ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)
def _op(*arguments):
    """Returns losses, terms and statistics."""
    given = reference.Arguments(*arguments)
    if not given.cls_logits.is_cuda:
        checks.check_labels(given.cls_logits.shape[1], given.target, given.second, given.teacher)
    if use_triton(given.cls_logits):
        from .triton_kernels import launch_forward

        return launch_forward(given)
    losses, terms = reference.forward(given)
    return losses, terms, losses.new_zeros((reference.STATISTICS, len(losses)))


@_op.register_fake
def _(cls_logits, *_):
    losses = cls_logits.new_empty(cls_logits.shape[0], dtype=torch.promote_types(cls_logits.dtype, torch.float32))
    return losses, losses.new_empty((2, len(losses))), losses.new_empty((reference.STATISTICS, len(losses)))


@torch.library.custom_op(
    "fastdeit::distillation_loss_backward",
    mutates_args=(),
    schema=f"(Tensor dlosses, Tensor statistics, {ARGUMENTS}) -> (Tensor, Tensor)",
)
def _backward_op(dlosses, statistics, *arguments):
    given = reference.Arguments(*arguments)
    if use_triton(given.cls_logits):
        from .triton_kernels import launch_backward

        return launch_backward(dlosses, statistics, given)
    return reference.backward(dlosses, given)


@_backward_op.register_fake
def _(dlosses, statistics, cls_logits, dist_logits, *_):
    dcls = cls_logits.new_empty(cls_logits.shape)
    return dcls, cls_logits.new_empty(0) if dist_logits is None else torch.empty_like(dcls)


def _setup_context(ctx, inputs, output):
    _, terms, statistics = output
    ctx.mark_non_differentiable(terms, statistics)
    ctx.save_for_backward(statistics, *inputs[:7])
    ctx.options = inputs[7:]


def _backward(ctx, dlosses, *_):
    statistics, *inputs = ctx.saved_tensors
    dcls, ddist = _backward_once(dlosses, statistics, *inputs, *ctx.options)
    return dcls, None if inputs[1] is None else ddist, *(None,) * 10


_apply = differentiable("distillation_loss", torch.ops.fastdeit.distillation_loss.default, _setup_context, _backward)
_backward_once = only_once("distillation_loss", torch.ops.fastdeit.distillation_loss_backward.default)
