"""distillation_loss: one launch forward, one backward, which takes both heads.

    class term    Q (max + log sum) - q.z                       dz = w_class (Q softmax(z) - q),  Q = sum of q
    hard term     max + log sum - x[first argmax of teacher]    dx = w_teacher (softmax(x) - e_argmax)
    soft term     scale KL(p || softmax(x / tau))               dx = w_teacher scale / tau (softmax(x / tau) - p)

with z the class head, x the head that hears the teacher, q the class target and p the teacher's probabilities. Forward,
a program takes a sample and gathers maxima, sums and dot products (the online softmax), which it leaves for backward,
seven numbers a sample. Backward is pointwise, and multiplies by the incoming gradient in float32: a gradient that was
divided by the batch and rounded before loss scaling reached it would underflow in float16. Softmax is
exp(z - max) / sum, so that logits of any size keep their digits. Nothing is accumulated between programs, so every run
gives the same bits.

Bytes that must move, two heads: forward reads 3 B C logits with a live teacher; backward reads them again, but for a
hard teacher's, and writes 2 B C: 8 B C elements, 7 for a hard teacher, 6 for cached targets. B = 1024, C = 1000 in
bfloat16: 16.4 MB, 3.4 us on an H200, though the second reading may find them in L2. Gradients made in the forward, and
multiplied in the backward, would be 9, 9 and 8.

The number of classes and the row strides are constexpr: only then does the compiler see that rows of 1,000 are aligned,
and moves 16 bytes at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import IGNORE, STATISTICS, Arguments

IGNORED = tl.constexpr(IGNORE)
LOG2_E = tl.constexpr(1.4426950408889634)
MAX_BLOCK = 2048  # classes held at a time, forward
BACKWARD_BLOCK = 1024  # of a backward program
ELEMENTS_PER_THREAD = 8  # of one tensor: 16 bytes in half precision


@triton.jit
def _load_row(ptr, j, C: tl.constexpr, other: tl.constexpr):
    return tl.load(ptr + j, mask=j < C, other=other).to(tl.float32)


@triton.jit
def _load_at(ptr, index, C: tl.constexpr):
    return tl.load(ptr + index, mask=(index >= 0) & (index < C), other=0.0).to(tl.float32)


@triton.jit
def _online_softmax(z, factor, running_max, running_sum):
    """One block's step: the maximum, and the sum of exp2(factor (z - max)); -inf adds nothing. The maximum is
    subtracted first, so that logits of any size keep their digits."""
    new_max = tl.maximum(running_max, tl.max(z, 0))
    block_sum = tl.sum(tl.exp2((z - new_max) * factor), 0)
    return new_max, running_sum * tl.exp2((running_max - new_max) * factor) + block_sum


@triton.jit
def _online_softmax_dot(t, x, factor, running_max, running_sum, running_dot):
    """The same, and the sum of exp2(factor (t - max)) (t - x) beside it."""
    new_max = tl.maximum(running_max, tl.max(t, 0))
    rescale, exp = tl.exp2((running_max - new_max) * factor), tl.exp2((t - new_max) * factor)
    dot = tl.sum(tl.where(exp > 0.0, exp * (t - x), 0.0), 0)
    return new_max, running_sum * rescale + tl.sum(exp, 0), running_dot * rescale + dot


@triton.jit
def _first_argmax(t, j, best_value, best, C: tl.constexpr):
    block_max = tl.max(t, 0)
    first = tl.min(tl.where(t == block_max, j, C - 1), 0)
    return tl.maximum(best_value, block_max), tl.where(block_max > best_value, first, best)


@triton.jit
def _load_labels(target_ptr, second_ptr, lam_ptr, row, C: tl.constexpr):
    """Labels a and b, lam, and the sample's validity: 1, or 0 if unlabelled, or NaN if a label is out of range."""
    a = tl.load(target_ptr + row)
    b, lam = a, 1.0
    if second_ptr is not None:
        b, lam = tl.load(second_ptr + row), tl.load(lam_ptr + row).to(tl.float32)
    missing = ((a == IGNORED) & (lam != 0.0)) | ((b == IGNORED) & (lam != 1.0))
    wrong = ((a != IGNORED) & ((a < 0) | (a >= C))) | ((b != IGNORED) & ((b < 0) | (b >= C)))
    return a, b, lam, tl.where(wrong, float("nan"), tl.where(missing, 0.0, 1.0))


@triton.jit
def _load_stored(indices_ptr, probs_ptr, K, C: tl.constexpr, BLOCK_K: tl.constexpr):
    """A cached target: K classes (-1 beyond them), their probabilities, and that of every other class."""
    k = tl.arange(0, BLOCK_K)
    index = tl.load(indices_ptr + k, mask=k < K, other=-1)
    prob = tl.load(probs_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    total, others = tl.sum(prob, 0), C - K
    prob = prob / tl.where(others > 0, tl.maximum(total, 1.0), total)
    return index, prob, tl.maximum(1.0 - total, 0.0) / tl.maximum(others, 1)


@triton.jit
def _x_log_x(x):
    return tl.where(x > 0.0, x * tl.log(tl.maximum(x, 1e-38)), 0.0)


@triton.jit
def _class_target(target_ptr, labels, j, smoothing, C: tl.constexpr):
    """q at the classes j; labels None: target_ptr is dense."""
    if labels is None:
        q = _load_at(target_ptr, j, C)
    else:
        a, b, lam = labels
        q = tl.where(j == a, lam, 0.0) + tl.where(j == b, 1.0 - lam, 0.0)
    return (1.0 - smoothing) * q + smoothing / C


@triton.jit
def distillation_loss_forward_kernel(
    losses_ptr, terms_ptr, statistics_ptr,
    cls_ptr, dist_ptr, target_ptr, second_ptr, lam_ptr, teacher_ptr, probs_ptr,
    batch, K, class_weight, teacher_weight, tau, soft_scale, smoothing,
    C: tl.constexpr, CLS_STRIDE: tl.constexpr, DIST_STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr,
    TEACHER_STRIDE: tl.constexpr, PROBS_STRIDE: tl.constexpr, TARGET: tl.constexpr, TEACHER: tl.constexpr,
    BLOCK_K: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """TARGET: none, labels or dense. TEACHER: none, hard_labels, hard_logits, soft_logits or soft_stored. With one
    head, dist_ptr is cls_ptr."""
    CLASS: tl.constexpr = TARGET != "none"
    LIVE: tl.constexpr = TEACHER == "hard_logits" or TEACHER == "soft_logits"
    STORED: tl.constexpr = TEACHER == "soft_stored"
    HARD: tl.constexpr = TEACHER == "hard_logits" or TEACHER == "hard_labels"
    row = tl.program_id(0).to(tl.int64)
    class_weight, teacher_weight = tl.cast(class_weight, tl.float32), tl.cast(teacher_weight, tl.float32)
    smoothing, soft_scale = tl.cast(smoothing, tl.float32), tl.cast(soft_scale, tl.float32)
    inverse_tau = 1.0 / tl.cast(tau, tl.float32)
    factor = inverse_tau * LOG2_E
    cls_ptr += row * CLS_STRIDE
    dist_ptr += row * DIST_STRIDE
    best, best_value = 0, float("-inf")
    q_sum, q_dot = 0.0, 0.0
    if TARGET == "labels":
        a, b, lam, valid = _load_labels(target_ptr, second_ptr, lam_ptr, row, C)
        q_sum, q_dot = 1.0, lam * _load_at(cls_ptr, a, C) + (1.0 - lam) * _load_at(cls_ptr, b, C)
    if TARGET == "dense":
        target_ptr += row * TARGET_STRIDE
    if TEACHER == "hard_labels":
        best = tl.load(teacher_ptr + row)
    if LIVE or STORED:
        teacher_ptr += row * TEACHER_STRIDE
    if STORED:
        index, prob, rest = _load_stored(teacher_ptr, probs_ptr + row * PROBS_STRIDE, K, C, BLOCK_K)

    # All rows of a block are asked for before any is used.
    lowest = tl.full((), -3e38, tl.float32)  # finite, so that -inf minus it is no NaN
    z_max, z_norm, z_sum = lowest, 0.0, 0.0
    x_max, x_norm, x_sum = lowest, 0.0, 0.0
    t_max, t_norm, t_dot = lowest, 0.0, 0.0
    for start in range(0, C, BLOCK):
        j = start + tl.arange(0, BLOCK)
        if CLASS:
            z = _load_row(cls_ptr, j, C, float("-inf"))
        if TEACHER != "none":
            x = _load_row(dist_ptr, j, C, float("-inf"))
        if LIVE:
            t = _load_row(teacher_ptr, j, C, float("-inf"))
        if TARGET == "dense":
            q = _load_row(target_ptr, j, C, 0.0)
            q_sum += tl.sum(q, 0)
            q_dot += tl.sum(tl.where(q != 0.0, q * z, 0.0), 0)
        if CLASS:
            z_max, z_norm = _online_softmax(z, LOG2_E, z_max, z_norm)
        if SMOOTHED:
            z_sum += tl.sum(tl.where(j < C, z, 0.0), 0)
        if TEACHER != "none":
            x_max, x_norm = _online_softmax(x, factor, x_max, x_norm)
        if TEACHER == "hard_logits":
            best_value, best = _first_argmax(t, j, best_value, best, C)
        if TEACHER == "soft_logits":
            t_max, t_norm, t_dot = _online_softmax_dot(t, x, factor, t_max, t_norm, t_dot)
        if STORED:
            x_sum += tl.sum(tl.where(j < C, x, 0.0), 0)

    # The two terms. Maxima are subtracted first: what is left is small and keeps its digits.
    class_term, teacher_term = 0.0, 0.0
    statistics_ptr += row
    if CLASS:
        q_sum = (1.0 - smoothing) * q_sum + smoothing
        q_dot = (1.0 - smoothing) * q_dot + smoothing / C * z_sum
        class_term = q_sum * z_max - q_dot + q_sum * tl.log(z_norm)
        if TARGET == "labels":
            class_term = tl.where(valid == 0.0, 0.0, class_term * valid)
            class_weight *= valid
        tl.store(statistics_ptr, z_max)
        tl.store(statistics_ptr + batch, q_sum / z_norm)
    if HARD:
        teacher_valid = tl.where((best >= 0) & (best < C), 1.0, float("nan"))
        teacher_term = (x_max - _load_at(dist_ptr, best, C) + tl.log(x_norm)) * teacher_valid  # tau is 1
        teacher_weight *= teacher_valid
        tl.store(statistics_ptr + 6 * batch, tl.cast(best, tl.float32))  # up to 2**24 it is exact
    if TEACHER == "soft_logits":
        difference = (t_dot / t_norm - (t_max - x_max)) * inverse_tau
        teacher_term = soft_scale * (difference + tl.log(x_norm) - tl.log(t_norm))
        tl.store(statistics_ptr + 4 * batch, t_max)
        tl.store(statistics_ptr + 5 * batch, 1.0 / t_norm)
    if STORED:
        x_stored = _load_at(dist_ptr, index, C)
        negative_entropy = tl.sum(_x_log_x(prob), 0) + (C - K) * _x_log_x(rest)
        dot = rest * x_sum + tl.sum(tl.where(index >= 0, (prob - rest) * x_stored, 0.0), 0)
        teacher_term = soft_scale * (negative_entropy + (x_max - dot) * inverse_tau + tl.log(x_norm))
    if TEACHER != "none":
        tl.store(statistics_ptr + 2 * batch, x_max)
        tl.store(statistics_ptr + 3 * batch, 1.0 / x_norm)
    tl.store(losses_ptr + row, class_weight * class_term + teacher_weight * teacher_term)
    tl.store(terms_ptr + row, class_term)
    tl.store(terms_ptr + batch + row, teacher_term)


@triton.jit
def distillation_loss_backward_kernel(
    grad_ptr, statistics_ptr, dcls_ptr, ddist_ptr,
    cls_ptr, dist_ptr, target_ptr, second_ptr, lam_ptr, teacher_ptr, probs_ptr,
    batch, K, class_weight, teacher_weight, tau, soft_scale, smoothing,
    C: tl.constexpr, CLS_STRIDE: tl.constexpr, DIST_STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr,
    TEACHER_STRIDE: tl.constexpr, PROBS_STRIDE: tl.constexpr, TARGET: tl.constexpr, TEACHER: tl.constexpr,
    BLOCK_K: tl.constexpr, TWO_HEADS: tl.constexpr, GRAD_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a sample's classes. With one head, its gradient joins the class head's, and ddist_ptr is dcls_ptr."""
    CLASS: tl.constexpr = TARGET != "none"
    STORED: tl.constexpr = TEACHER == "soft_stored"
    HARD: tl.constexpr = TEACHER == "hard_logits" or TEACHER == "hard_labels"
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK
    j = start + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + row * GRAD_STRIDE).to(tl.float32)
    class_weight, teacher_weight = tl.cast(class_weight, tl.float32) * grad, tl.cast(teacher_weight, tl.float32) * grad
    smoothing = tl.cast(smoothing, tl.float32)
    inverse_tau = 1.0 / tl.cast(tau, tl.float32)
    factor = inverse_tau * LOG2_E
    cls_ptr += row * CLS_STRIDE
    dist_ptr += row * DIST_STRIDE
    dcls_ptr += row * C
    ddist_ptr += row * C
    statistics_ptr += row
    labels = None
    dz, dx = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if TARGET == "labels":
        a, b, lam, valid = _load_labels(target_ptr, second_ptr, lam_ptr, row, C)
        labels = a, b, lam
        class_weight *= valid
    if TARGET == "dense":
        target_ptr += row * TARGET_STRIDE
    if CLASS:
        z_max, z_scale = tl.load(statistics_ptr), class_weight * tl.load(statistics_ptr + batch)
        z_exp = tl.exp2((_load_row(cls_ptr, j, C, 0.0) - z_max) * LOG2_E)
        dz = z_scale * z_exp - class_weight * _class_target(target_ptr, labels, j, smoothing, C)
    if TEACHER != "none":
        x_max, x_scale = tl.load(statistics_ptr + 2 * batch), tl.load(statistics_ptr + 3 * batch)
        x_exp = tl.exp2((_load_row(dist_ptr, j, C, 0.0) - x_max) * factor)
        if HARD:
            best = tl.load(statistics_ptr + 6 * batch)
            teacher_weight *= tl.where((best >= 0.0) & (best < C), 1.0, float("nan"))
            p_teacher = tl.where(j == best.to(tl.int32), 1.0, 0.0)
        if TEACHER == "soft_logits":
            t_max, t_scale = tl.load(statistics_ptr + 4 * batch), tl.load(statistics_ptr + 5 * batch)
            t = _load_row(teacher_ptr + row * TEACHER_STRIDE, j, C, 0.0)
            p_teacher = tl.exp2((t - t_max) * factor) * t_scale
        if STORED:
            teacher_ptr += row * TEACHER_STRIDE
            index, prob, rest = _load_stored(teacher_ptr, probs_ptr + row * PROBS_STRIDE, K, C, BLOCK_K)
            p_teacher = rest
        teacher_weight *= tl.cast(soft_scale, tl.float32) * inverse_tau
        dx = teacher_weight * (x_exp * x_scale - p_teacher)
    if TWO_HEADS:
        tl.store(dcls_ptr + j, dz.to(dcls_ptr.dtype.element_ty), mask=j < C)
        tl.store(ddist_ptr + j, dx.to(ddist_ptr.dtype.element_ty), mask=j < C)
    else:
        tl.store(dcls_ptr + j, (dz + dx).to(dcls_ptr.dtype.element_ty), mask=j < C)
    if STORED:  # the classes of this block that are named were written as if they were others: write them again
        tl.debug_barrier()
        x_stored = _load_at(dist_ptr, index, C)
        dx = teacher_weight * (tl.exp2((x_stored - x_max) * factor) * x_scale - prob)
        if CLASS and not TWO_HEADS:  # x is z, and tau its own
            dx += z_scale * tl.exp2((x_stored - z_max) * LOG2_E)
            dx -= class_weight * _class_target(target_ptr, labels, index, smoothing, C)
        own = (index >= start) & (index < start + BLOCK) & (index < C)
        tl.store(ddist_ptr + index, dx.to(ddist_ptr.dtype.element_ty), mask=own)


def launch_forward(given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`; the statistics, (STATISTICS, B), beside the results."""
    batch, classes = given.cls_logits.shape
    losses = given.cls_logits.new_empty(batch, dtype=torch.float32)
    terms, statistics = (losses.new_empty((rows, batch)) for rows in (2, STATISTICS))
    arguments, static = _shared(given)
    smoothed = given.target is not None and given.smoothing > 0
    with torch.cuda.device_of(given.cls_logits):
        distillation_loss_forward_kernel[(batch,)](
            losses, terms, statistics, *arguments, **static, SMOOTHED=smoothed, **block_of(classes, MAX_BLOCK)
        )
    return losses, terms, statistics


def launch_backward(dlosses: Tensor, statistics: Tensor, given: Arguments) -> tuple[Tensor, Tensor]:
    """As `reference.backward`."""
    cls_logits, two_heads = given.cls_logits, given.dist_logits is not None
    batch, classes = cls_logits.shape
    dcls = cls_logits.new_empty(cls_logits.shape)
    ddist = cls_logits.new_empty(cls_logits.shape if two_heads else 0)
    arguments, static = _shared(given)
    block = block_of(classes, BACKWARD_BLOCK)
    with torch.cuda.device_of(cls_logits):
        distillation_loss_backward_kernel[(batch * triton.cdiv(classes, block["BLOCK"]),)](
            dlosses, statistics, dcls, ddist if two_heads else dcls, *arguments, **static,
            TWO_HEADS=two_heads, GRAD_STRIDE=dlosses.stride(0), **block,
        )  # fmt: skip
    return dcls, ddist


def _shared(given: Arguments) -> tuple[list, dict]:
    """What both launches are told: arguments in their order, and constants by name."""
    cls_logits, dist_logits, target, second, lam, teacher, teacher_probs, kind, alpha, tau, smoothing, numel = given
    batch, classes = cls_logits.shape
    soft = kind == "soft"
    dist_logits = cls_logits if dist_logits is None else dist_logits
    labels = [None if t is None else t if t.ndim == 2 else t.contiguous() for t in (target, second, lam, teacher)]
    class_weight, teacher_weight = (1.0, 0.0) if kind == "none" else (1.0 - alpha, alpha)
    soft_scale = tau * tau / classes if numel else tau * tau
    stored = 0 if teacher is None or teacher_probs is None else teacher.shape[1]
    arguments = [
        cls_logits, dist_logits, *labels, teacher_probs, batch, stored, class_weight, teacher_weight,
        tau if soft else 1.0, soft_scale if soft else 1.0, smoothing,
    ]  # fmt: skip
    return arguments, {
        "C": classes, "CLS_STRIDE": cls_logits.stride(0), "DIST_STRIDE": dist_logits.stride(0),
        "TARGET_STRIDE": _row_stride(target), "TEACHER_STRIDE": _row_stride(teacher),
        "PROBS_STRIDE": _row_stride(teacher_probs), "TARGET": _target_mode(target),
        "TEACHER": _teacher_mode(kind, teacher, teacher_probs), "BLOCK_K": triton.next_power_of_2(stored),
        "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip


def block_of(classes: int, largest: int) -> dict:
    """How many classes a program takes at a time, and the warps for them."""
    block = min(triton.next_power_of_2(classes), largest)
    return {"BLOCK": block, "num_warps": max(1, min(block // ELEMENTS_PER_THREAD // 32, 4))}


def _row_stride(tensor: Tensor | None) -> int:
    return tensor.stride(0) if tensor is not None and tensor.ndim == 2 else 0


def _target_mode(target: Tensor | None) -> str:
    if target is None:
        return "none"
    return "dense" if target.ndim == 2 else "labels"


def _teacher_mode(kind: str, teacher: Tensor | None, teacher_probs: Tensor | None) -> str:
    if kind == "none" or teacher is None:
        return "none"
    if teacher.ndim == 1:
        return "hard_labels"
    return f"{kind}_logits" if teacher_probs is None else "soft_stored"
