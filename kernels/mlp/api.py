"""The MLP of a transformer's block as one operation, whose hidden state is never kept."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from fastdeit.kernels.autograd import differentiable, only_once
from fastdeit.kernels.backend import autocast, full_precision, left_to_pytorch, use_triton

from .reference import mlp_backward_reference, mlp_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# That have kernels. The sums of wider rows leave no registers for a second program on a multiprocessor, and one alone
# waits for its own products: separate operators are then faster, by the model of benchmarks/mlp_cycles.py.
WIDTHS = (64, 128, 192)
HIDDEN_MULTIPLE = 64


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """linear(gelu(linear(x, weight1, bias1)), weight2, bias2) with the exact (erf) GELU of ViT and DeiT.

    Forward, the hidden state stays in registers; backward computes it again and sums in an order that depends on the
    shape only, so that every run gives the same bits. Kept for backward are the arguments alone. Products and sums are
    in float32; the hidden state is rounded to x's dtype before the second product, as separate operators would. Under
    autocast x and the weights are cast, as those of a Linear.

    Kernels exist for half precision, a width of 64, 128 or 192 and a hidden width that is a multiple of 64; on a GPU
    anything else is computed by PyTorch's own operators, which are faster there. GELU: Hendrycks and Gimpel,
    arXiv:1606.08415, the form x Phi(x).

    Args:
        x: (..., width) floating point, two dimensions or more.
        weight1, weight2: (hidden, width) and (width, hidden), of x's dtype unless autocast is on.
        bias1, bias2: (hidden,) and (width,), of any floating dtype.

    Returns: the shape and dtype of x (of autocast, where that is on), contiguous.

    Raises: ValueError for shapes, dtypes or devices that do not fit.
    """
    x, weight1, weight2 = autocast(x, weight1, weight2)
    _check(x, weight1, bias1, weight2, bias2)
    if x.device.type != "cpu" and (not has_kernels(x, weight1) or left_to_pytorch(x.device, x.dtype)):
        hidden = F.gelu(F.linear(x, weight1, bias1.to(x.dtype)))
        return F.linear(hidden, weight2, bias2.to(x.dtype))
    return _apply(x.flatten(0, -2), weight1, bias1, weight2, bias2).view(x.shape)


def has_kernels(x: Tensor, weight1: Tensor) -> bool:
    """Whether x's width, the hidden one and the dtype have kernels; float32, on a GPU, has none."""
    dtypes = (torch.float16, torch.bfloat16) if x.is_cuda else DTYPES[:3]  # the interpreter takes float32
    return x.dtype in dtypes and x.shape[-1] in WIDTHS and len(weight1) % HIDDEN_MULTIPLE == 0


@torch.library.custom_op("fastdeit::mlp", mutates_args=())
def _mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    if use_triton(x) and has_kernels(x, weight1):
        from .triton_kernels import mlp_triton

        return mlp_triton(x, weight1, bias1, weight2, bias2)
    with full_precision(x):
        return mlp_reference(x, weight1, bias1, weight2, bias2)


@_mlp.register_fake
def _(x, weight1, bias1, weight2, bias2):
    return x.new_empty(x.shape)


@torch.library.custom_op("fastdeit::mlp_backward", mutates_args=())
def _mlp_backward(
    grad: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if use_triton(x) and has_kernels(x, weight1):
        from .triton_kernels import mlp_backward_triton

        return mlp_backward_triton(grad, x, weight1, bias1, weight2)
    with full_precision(x):
        return mlp_backward_reference(grad, x, weight1, bias1, weight2)


@_mlp_backward.register_fake
def _(grad, x, weight1, bias1, weight2):
    hidden = x.new_empty(x.shape[0], weight1.shape[0])
    return x.new_empty(x.shape), hidden, torch.empty_like(hidden), torch.empty_like(bias1)


def _setup_context(ctx, inputs, output):
    *kept, bias2 = inputs
    ctx.save_for_backward(*kept)
    ctx.bias2_dtype = bias2.dtype


def _backward(ctx, grad):
    x, weight1, bias1, weight2 = ctx.saved_tensors
    dx, hidden, d_hidden, d_bias1 = _backward_once(grad, x, weight1, bias1, weight2)
    # Sums over rows, by PyTorch's own products: those of weights that are frozen are not computed.
    _, of_weight1, _, of_weight2, of_bias2 = ctx.needs_input_grad
    d_weight1 = d_hidden.t() @ x if of_weight1 else None
    d_weight2 = grad.t() @ hidden if of_weight2 else None
    d_bias2 = grad.sum(0, dtype=_sum_dtype(grad)).to(ctx.bias2_dtype) if of_bias2 else None
    return dx, d_weight1, d_bias1, d_weight2, d_bias2


def _sum_dtype(grad: Tensor) -> torch.dtype:
    return torch.promote_types(grad.dtype, torch.float32)


_apply = differentiable("mlp", torch.ops.fastdeit.mlp.default, _setup_context, _backward)
_backward_once = only_once("mlp", torch.ops.fastdeit.mlp_backward.default)


@register_flop_formula(torch.ops.fastdeit.mlp)
def _(x, weight1, *_, **__) -> int:
    return 2 * 2 * x[0] * x[1] * weight1[0]


@register_flop_formula(torch.ops.fastdeit.mlp_backward)
def _(grad, x, weight1, *_, **__) -> int:
    return 3 * 2 * x[0] * x[1] * weight1[0]  # the hidden state again, its gradient, and x's


def _check(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> None:
    if x.ndim < 2 or x.dtype not in DTYPES:
        raise ValueError(f"x must be (..., width) of float32, float16 or bfloat16, got {tuple(x.shape)} {x.dtype}")
    width = x.shape[-1]
    if weight1.ndim != 2 or weight1.shape[1] != width:
        raise ValueError(f"weight1 must be (hidden, {width}) for x of {tuple(x.shape)}, got {tuple(weight1.shape)}")
    hidden = len(weight1)
    expected = {"weight2": (width, hidden), "bias1": (hidden,), "bias2": (width,)}
    given = {"weight1": weight1, "weight2": weight2, "bias1": bias1, "bias2": bias2}
    for name, shape in expected.items():
        if tuple(given[name].shape) != shape:
            raise ValueError(f"{name} must be {shape} for weight1 of {(hidden, width)}, got {tuple(given[name].shape)}")
    for name, tensor in given.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device")
        if tensor.dtype not in DTYPES or (name.startswith("weight") and tensor.dtype != x.dtype):
            raise ValueError(f"{name} is {tensor.dtype} and x {x.dtype}: cast one of them, or use torch.autocast")
