"""Every operation beside PyTorch's formulas under torch.func; what it does not do, it says; FLOP are counted."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastdeit import kernels

LABELS = torch.tensor([2, 0])


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(-2, -3) for x in (q, k, v))).transpose(-2, -3)


def maps_kl(q, k, teacher_q, teacher_k):
    S, T = (torch.einsum("bnhd,bmhd->bhnm", *pair) * 8**-0.5 for pair in ((q, k), (teacher_q, teacher_k)))
    return F.kl_div(S.log_softmax(-1), T.softmax(-1), reduction="none").sum(-1).mean()


def two_head_loss(z, x):
    return 0.5 * F.cross_entropy(z, LABELS) + 0.5 * F.cross_entropy(x, LABELS)


# Ours, PyTorch's, shapes of the arguments. Those with one dimension are parameters.
OPERATIONS = {
    "attention": (kernels.attention, sdpa, [(2, 5, 2, 32)] * 3),
    "attention_qkvpacked": (kernels.attention_qkvpacked, lambda x: sdpa(*x.unbind(-3)), [(2, 5, 3, 2, 32)]),
    "attention_distillation_loss": (kernels.attention_distillation_loss, maps_kl, [(2, 5, 2, 8)] * 4),
    "distillation_loss": (
        lambda z, x: kernels.distillation_loss(z, x, LABELS, LABELS, kind="hard"), two_head_loss, [(2, 3)] * 2,
    ),
    "add_layer_norm": (
        lambda x, r, w, b: kernels.add_layer_norm(x, r, w, b)[0],
        lambda x, r, w, b: F.layer_norm(x + r, w.shape, w, b, 1e-6), [(2, 3, 8)] * 2 + [(8,)] * 2,
    ),
    "bias_gelu": (kernels.bias_gelu, lambda x, b: F.gelu(x + b), [(2, 8), (8,)]),
    "mlp": (
        kernels.mlp, lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
        [(2, 4), (6, 4), (6,), (4, 6), (4,)],
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize("name", OPERATIONS)
QUIET = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def make(name, mapped=()):
    """Both functions, to a number not linear in them, and arguments; all but parameters with `mapped` in front."""
    ours, theirs, shapes = OPERATIONS[name]
    generator = torch.Generator().manual_seed(0)
    shapes = [(*mapped, *shape) if len(shape) > 1 else shape for shape in shapes]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return lambda *x: ours(*x).sin().sum(), lambda *x: theirs(*x).sin().sum(), inputs


@EACH
def test_gradients_by_torch_func(name):
    ours, theirs, inputs = make(name)
    every = tuple(range(2 if name == "attention_distillation_loss" else len(inputs)))  # its teacher gets none
    torch.testing.assert_close(torch.func.grad(ours, every)(*inputs), torch.func.grad(theirs, every)(*inputs))


@QUIET
@EACH
@pytest.mark.parametrize("dim", [0, 1])
def test_gradients_of_each_sample(name, dim):
    ours, theirs, inputs = make(name, mapped=(3,))
    every = tuple(range(2 if name == "attention_distillation_loss" else len(inputs)))
    in_dims = tuple(dim if x.ndim > 1 else None for x in inputs)
    inputs = [x.movedim(0, dim) if x.ndim > 1 else x for x in inputs]
    results = [torch.func.vmap(torch.func.grad(f, every), in_dims)(*inputs) for f in (ours, theirs)]
    torch.testing.assert_close(*results)


@EACH
def test_forward_derivatives_are_refused(name):
    ours, _, inputs = make(name)
    with pytest.raises(NotImplementedError, match=f"{name} has no forward derivative"):
        torch.func.jvp(ours, tuple(inputs), tuple(inputs))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{name} has no forward derivative"):
        ours(*(forward_ad.make_dual(x, x) for x in inputs))
    with pytest.raises(NotImplementedError, match=f"{name} has no forward derivative"):
        torch.func.hessian(ours)(*inputs)


@EACH
def test_second_derivatives_are_refused(name):
    ours, _, inputs = make(name)
    penalty = torch.func.grad(lambda *x: torch.func.grad(ours)(*x).square().sum())
    with pytest.raises(RuntimeError, match=f"{name} cannot be differentiated twice"):
        penalty(*inputs)


def flop(function, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    with FlopCounterMode(display=False) as counter:
        function(*inputs).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["attention", "attention_qkvpacked"])
def test_flop_are_those_pytorch_counts_for_its_own_attention(name):
    ours, theirs, inputs = make(name)
    counted = flop(ours, inputs)
    assert counted == 14 * 2 * 2 * 5 * 5 * 32
    assert flop(theirs, [x.float() for x in inputs]) in (counted, 0)  # PyTorch 2.11 counts none of its own on the CPU


def test_flop_of_the_mlp():
    assert flop(*make("mlp")[::2]) == 7 * 2 * 2 * 4 * 6  # the hidden state is computed twice


def test_flop_of_attention_distillation():
    assert flop(*make("attention_distillation_loss")[::2]) == 6 * 2 * 2 * 2 * 5 * 5 * 8
