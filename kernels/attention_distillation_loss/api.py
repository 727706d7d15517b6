"""Distance between the attention maps of a student and a teacher, with no map in memory."""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastdeit.kernels.autograd import differentiable, only_once
from fastdeit.kernels.backend import INTERPRETED, full_precision, use_triton


def attention_distillation_loss(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    *,
    rows: str = "all",
    objective: str = "kl",
    heads: str | int = "equal",
    student_prefix: int = 2,
    teacher_prefix: int = 1,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
) -> Tensor:
    """Mean over batch, heads and query tokens of KL(softmax(teacher q k^T) || softmax(student q k^T)).

    Gradients reach the student's q and k only. They are given before the softmax, unscaled, as attention takes them. A
    relation of MiniLMv2 is the same function of other tensors: (q, q), (k, k) or (v, v) of both models in place of
    (q, k).

    On a GPU no map is ever in memory, only O(batch * heads * tokens) numbers: each model's scores are computed once in
    the forward and twice in the backward. Maps averaged over heads (`heads="mean"` with "kl") are the exception: plain
    PyTorch makes them, forward and backward, for as many images at a time as fit into 512 MB. Runs give the same bits.
    It helps when the models are alike: attention transfer from some families of teachers costs accuracy (arXiv
    2605.07191).

    Args:
        student_q, student_k: (batch, tokens, heads, head_dim), any strides with a contiguous last dimension, such as
            views of a packed qkv; float32, float16 or bfloat16 (on the CPU also float64).
        teacher_q, teacher_k: likewise. Its dtype, head_dim, heads and tokens may differ from the student's, the
            latter two as `heads` and the prefixes allow.
        rows: "all" query tokens, or "prefix": the class (and distillation) tokens' rows only, as in AttnDistill.
        objective: "kl", or "mse": mean squared difference of the scaled scores, as TinyBERT.
        heads: "equal": head by head, as many on both sides. "mean": maps are averaged over each model's heads and the
            averages compared ("mse": the scores are averaged). An integer: all channels of a token are regrouped into
            so many relation heads, whatever the models' heads and widths are; both widths must be divisible by it.
        student_prefix, teacher_prefix: tokens in front of the patches: 2 for class and distillation token, 1 for a
            class token. Where both models have the same number of tokens, these are matched one by one, and "prefix"
            rows are those that both have. Otherwise all prefix tokens are left out as keys, before the softmax, so
            that each row is a distribution over the patches; "all" rows are then those of the patches, and "prefix"
            compares each of the student's prefix rows with the row of the teacher's first token.
        student_scale, teacher_scale: factor of the scores; None: head_dim^-0.5 (of a relation head, if regrouped).

    Returns: float32 scalar.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit.

    Sources: MiniLMv2 (arXiv 2012.15828: relation heads, q-q, k-k and v-v relations); MiniViT (arXiv 2204.07154;
    microsoft/Cream, MiniViT/Mini-Swin: the same in vision transformers); On the Surprising Effectiveness of Attention
    Transfer for Vision Transformers (NeurIPS 2024, arXiv 2411.09702: whole maps, head by head); Attention Distillation
    (arXiv 2210.00944, AttnDistill: the class token's row); TinyBERT (arXiv 1909.10351: scores before the softmax). Some
    of them write cross entropy, which differs from KL by a constant of the teacher.
    """
    _check(student_q, student_k, teacher_q, teacher_k, rows, objective, heads)
    teacher_q, teacher_k = teacher_q.detach(), teacher_k.detach()
    student_q, student_k, teacher_q, teacher_k = _match_tokens(
        student_q, student_k, teacher_q, teacher_k, rows, student_prefix, teacher_prefix
    )
    student_scale = _scale(student_q, heads, student_scale)
    teacher_scale = _scale(teacher_q, heads, teacher_scale)
    if heads == "mean" and objective == "mse":
        # The mean of the heads' scores is the score of all channels together.
        student_scale, teacher_scale = student_scale / student_q.shape[2], teacher_scale / teacher_q.shape[2]
        heads = 1
    if isinstance(heads, int):
        student_q, student_k, teacher_q, teacher_k = (
            t.flatten(2).unflatten(2, (heads, -1)) for t in (student_q, student_k, teacher_q, teacher_k)
        )
    objective = "mean_kl" if heads == "mean" else objective
    return _apply(student_q, student_k, teacher_q, teacher_k, student_scale, teacher_scale, objective)[0]


def _match_tokens(student_q, student_k, teacher_q, teacher_k, rows, student_prefix, teacher_prefix):
    """Slices both models' queries and keys to those that are compared, one by one."""
    if student_q.shape[1] == teacher_q.shape[1]:
        count = min(student_prefix, teacher_prefix)
        if rows == "prefix":
            student_q, teacher_q = student_q[:, :count], teacher_q[:, :count]
    else:
        student_k, teacher_k = student_k[:, student_prefix:], teacher_k[:, teacher_prefix:]
        if student_k.shape[1] != teacher_k.shape[1] or not student_k.shape[1]:
            raise ValueError(
                f"without their {student_prefix} and {teacher_prefix} prefix tokens, student and teacher have "
                f"{student_k.shape[1]} and {teacher_k.shape[1]} patches; correct student_prefix and teacher_prefix, "
                "or give both models images with the same number of patches."
            )
        if rows == "prefix":
            count = student_prefix if teacher_prefix else 0
            student_q, teacher_q = student_q[:, :count], teacher_q[:, :1].expand(-1, count, -1, -1)
        else:
            student_q, teacher_q = student_q[:, student_prefix:], teacher_q[:, teacher_prefix:]
    if not student_q.shape[1]:
        raise ValueError('rows="prefix" needs prefix tokens: student_prefix and teacher_prefix must be at least 1.')
    return student_q, student_k, teacher_q, teacher_k


def _scale(q, heads, scale):
    if scale is not None:
        return float(scale)
    head_dim = q.shape[2] * q.shape[3] // heads if isinstance(heads, int) else q.shape[3]
    return head_dim**-0.5


@torch.library.custom_op("fastdeit::attention_distillation_loss", mutates_args=())
def _op(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    student_scale: float,
    teacher_scale: float,
    objective: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if objective != "mean_kl" and use_triton(student_q):
        from .triton_kernels import forward
    else:
        from .reference import forward
    with full_precision(student_q):
        return forward(student_q, student_k, teacher_q, teacher_k, student_scale, teacher_scale, objective)


@_op.register_fake
def _(student_q, student_k, teacher_q, teacher_k, student_scale, teacher_scale, objective):
    B, R = student_q.shape[:2]
    loss = student_q.new_empty((), dtype=torch.promote_types(student_q.dtype, torch.float32))
    lse = (loss.new_empty(0 if objective == "mse" else (B, q.shape[2], R)) for q in (student_q, teacher_q))
    return loss, *lse


@torch.library.custom_op("fastdeit::attention_distillation_loss_backward", mutates_args=())
def _backward_op(
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
    if objective != "mean_kl" and use_triton(student_q):
        from .triton_kernels import backward
    else:
        from .reference import backward
    tensors = dloss, student_q, student_k, teacher_q, teacher_k, student_lse, teacher_lse
    with full_precision(student_q):
        return backward(*tensors, student_scale, teacher_scale, objective)


@_backward_op.register_fake
def _(dloss, student_q, student_k, *_):
    return student_q.new_empty(student_q.shape), student_k.new_empty(student_k.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.student_scale, ctx.teacher_scale, ctx.objective = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx, dloss, *_):
    dq, dk = _backward_once(dloss, *ctx.saved_tensors, ctx.student_scale, ctx.teacher_scale, ctx.objective)
    return dq, dk, *(None,) * 5


_ops = torch.ops.fastdeit
_apply = differentiable(
    "attention_distillation_loss", _ops.attention_distillation_loss.default, _setup_context, _backward
)
_backward_once = only_once("attention_distillation_loss", _ops.attention_distillation_loss_backward.default)


@register_flop_formula(_ops.attention_distillation_loss)
def _(student_q, student_k, teacher_q, *_, **__) -> int:
    """The scores of both models."""
    return sum(2 * math.prod(q) * student_k[1] for q in (student_q, teacher_q))


@register_flop_formula(_ops.attention_distillation_loss_backward)
def _(dloss, student_q, student_k, teacher_q, *_, **__) -> int:
    """The scores of both models again, and two products for the gradients."""
    return sum(2 * math.prod(q) * student_k[1] for q in (*3 * (student_q,), teacher_q))


def _check(student_q, student_k, teacher_q, teacher_k, rows, objective, heads):
    for name, value, known in (("rows", rows, ("all", "prefix")), ("objective", objective, ("kl", "mse"))):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, not {value!r}.")
    if heads not in ("equal", "mean") and not (type(heads) is int and heads > 0):
        raise ValueError(f'heads must be "equal", "mean" or a number of relation heads, not {heads!r}.')
    for model, q, k in (("student", student_q, student_k), ("teacher", teacher_q, teacher_k)):
        _check_model(model, q, k, heads)
    if student_q.device != teacher_q.device:
        raise ValueError(f"the student is on {student_q.device}, the teacher on {teacher_q.device}; move one of them.")
    if len(student_q) != len(teacher_q):
        raise ValueError(f"student and teacher must see one batch, not {len(student_q)} and {len(teacher_q)} images.")
    if heads == "equal" and student_q.shape[2] != teacher_q.shape[2]:
        raise ValueError(
            f"the student has {student_q.shape[2]} heads, the teacher {teacher_q.shape[2]}: compare their mean "
            '(heads="mean") or relation heads (heads=12, or another divisor of both widths).'
        )


def _check_model(model, q, k, heads):
    floats = (torch.float32, torch.float16, torch.bfloat16)
    for name, tensor in ((f"{model}_q", q), (f"{model}_k", k)):
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(f"{name} must be (batch, tokens, heads, head_dim), none 0, not {tuple(tensor.shape)}.")
        double = tensor.dtype == torch.float64 and tensor.device.type == "cpu" and not INTERPRETED
        if tensor.dtype not in floats and not double:
            raise ValueError(f"{name} must be float32, float16 or bfloat16, not {tensor.dtype}; cast it first.")
        if tensor.shape[3] > 1 and tensor.stride(3) != 1:
            raise ValueError(f"the last dimension of {name} must be contiguous; call .contiguous() first.")
    for what in ("shape", "dtype", "device"):
        if getattr(q, what) != getattr(k, what):
            raise ValueError(f"{model}_q and {model}_k differ in {what}: {getattr(q, what)}, {getattr(k, what)}.")
    width = q.shape[2] * q.shape[3]
    if type(heads) is int and width % heads:
        raise ValueError(f"the {model}'s width {width} cannot be regrouped into {heads} heads; choose a divisor of it.")
