"""What a caller of distillation_loss can get wrong, in words."""

import torch

from fastdeit.kernels.backend import INTERPRETED

from .reference import IGNORE

KINDS = ("none", "hard", "soft")
MAX_CLASSES = 32768


def check_options(kind, alpha, tau, smoothing, soft_reduction, reduction):
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}.")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha, the weight of the teacher term, must be in [0, 1], not {alpha}.")
    if not tau > 0.0:
        raise ValueError(f"tau, the temperature, must be above 0, not {tau}.")
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing must be in [0, 1), not {smoothing}.")
    if soft_reduction not in ("batchmean", "numel"):
        raise ValueError(f'soft_reduction must be "batchmean" or "numel", not {soft_reduction!r}.')
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", not {reduction!r}.')


def check_logits(cls_logits, dist_logits):
    floats = (torch.float32, torch.float16, torch.bfloat16)
    double = cls_logits.dtype == torch.float64 and cls_logits.device.type == "cpu" and not INTERPRETED
    if cls_logits.dtype not in floats and not double:
        raise ValueError(f"cls_logits must be float32, float16 or bfloat16, not {cls_logits.dtype}; cast them first.")
    if cls_logits.ndim != 2 or 0 in cls_logits.shape:
        raise ValueError(f"cls_logits must be (batch, classes), neither of them 0, not {tuple(cls_logits.shape)}.")
    if cls_logits.shape[1] > MAX_CLASSES:
        raise ValueError(f"distillation_loss takes up to {MAX_CLASSES} classes, not {cls_logits.shape[1]}.")
    if dist_logits is not None:
        if dist_logits.dtype != cls_logits.dtype:
            raise ValueError(f"cls_logits and dist_logits differ in dtype: {cls_logits.dtype}, {dist_logits.dtype}.")
        _check("dist_logits", dist_logits, cls_logits, cls_logits.shape, floating=True)
    _check_rows("cls_logits", cls_logits)


def check_target(cls_logits, target, mix):
    batch = cls_logits.shape[:1]
    if target is not None and target.ndim == 2:
        if mix is not None:
            raise ValueError("a (batch, classes) target is mixed already: leave out mix, or give labels.")
        _check("target", target, cls_logits, cls_logits.shape, floating=True)
    elif target is not None:
        _check("target", target, cls_logits, batch)
    if mix is None:
        return
    if target is None:
        raise ValueError("mix needs the labels it mixes: give target.")
    second, lam = mix
    _check("the second labels of mix", second, cls_logits, batch)
    if isinstance(lam, torch.Tensor):
        _check("the lam of mix", lam, cls_logits, batch, floating=True)
    elif not 0.0 <= lam <= 1.0:
        raise ValueError(f"the lam of mix must be in [0, 1], not {lam}.")


def check_teacher(cls_logits, teacher, kind):
    if kind == "none" and teacher is not None:
        raise ValueError('kind "none" has no teacher term: leave out the teacher, or choose kind "hard" or "soft".')
    if kind != "none" and teacher is None:
        raise ValueError(f'kind "{kind}" needs a teacher: its logits, its labels or (indices, probabilities).')
    if isinstance(teacher, tuple):
        indices, probs = teacher
        if indices.ndim != 2 or not 0 < indices.shape[1] <= cls_logits.shape[1]:
            raise ValueError(f"the teacher's indices must be (batch, 1 to classes), not {tuple(indices.shape)}.")
        _check("the teacher's indices", indices, cls_logits, (cls_logits.shape[0], indices.shape[1]))
        _check("the teacher's probabilities", probs, cls_logits, indices.shape, floating=True)
    elif teacher is not None and teacher.ndim == 1:
        if kind == "soft":
            raise ValueError('kind "soft" needs the teacher\'s logits or (indices, probabilities), not its labels.')
        _check("the teacher's labels", teacher, cls_logits, cls_logits.shape[:1])
    elif teacher is not None:
        _check("the teacher's logits", teacher, cls_logits, cls_logits.shape, floating=True)


def _check(name, tensor, logits, shape, floating=False):
    """Checks what goes with the logits: shape, device, and int64 or a floating dtype."""
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)} to fit the class logits, not {tuple(tensor.shape)}.")
    if tensor.device != logits.device:
        raise ValueError(f"{name} is on {tensor.device}, the class logits on {logits.device}; move it there first.")
    if tensor.is_floating_point() != floating or (not floating and tensor.dtype != torch.int64):
        raise ValueError(f"{name} must be {'floating point' if floating else 'int64'}, not {tensor.dtype}.")
    _check_rows(name, tensor)


def _check_rows(name, tensor):
    if tensor.ndim == 2 and tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"the last dimension of {name} must be contiguous; call .contiguous() first.")


def check_labels(classes, target, second, teacher):
    """Ranges of labels; looks at values, so it runs inside the operation and on the CPU only."""
    for name, labels in (("target", target), ("second label", second), ("teacher's label", teacher)):
        if labels is None or labels.dtype != torch.int64:
            continue
        wrong = (labels < 0) | (labels >= classes)
        if labels is not teacher:
            wrong &= labels != IGNORE
        if wrong.any():
            raise ValueError(
                f"{name} {labels[wrong][0]} is out of range: classes are 0 to {classes - 1}, "
                f"and {IGNORE} marks an unlabelled sample of target or mix."
            )
