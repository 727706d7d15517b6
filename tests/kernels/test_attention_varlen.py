"""attention_varlen against float64, sequence by sequence: on the CPU, in the interpreter, compiled on a GPU.

tests/ptx runs the compiled code on the CPU. The budget is that of attention_oracle.py.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastdeit.kernels import attention_varlen
from tests.kernels import attention_oracle
from tests.kernels.attention_oracle import error, gradients, within

CASES = [  # lengths, heads, head_dim; then, where it is not the longest, max_seqlen
    ((37, 5, 0, 64), 2, 32),
    ((1, 70), 3, 72),
    ((0, 0, 33, 0), 1, 16),
    ((65,), 1, 128),
]
HALF = [torch.float16, torch.bfloat16]
UNUSED = 3  # tokens after the last sequence


def edges(lengths, device="cpu"):
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32, device=device)


def make(lengths, heads, head_dim, dtype, device="cpu", unused=UNUSED):
    """q, k, v between NaN, each with strides of its own, and cu_seqlens."""
    generator, total = torch.Generator().manual_seed(sum(lengths)), sum(lengths) + unused
    tensors = []
    for rows in (1, 2, 3):
        around = torch.full((total + 2, rows, heads + 1, head_dim + 16), float("nan"), dtype=dtype, device=device)
        view = around[1:-1, rows - 1, :heads, 8:-8]
        view.copy_(torch.randn(view.shape, generator=generator))
        if unused:
            view[-unused:] = torch.nan  # which nobody may read
        tensors.append(view)
    return *tensors, edges(lengths, device)


def one_by_one(function, cu_seqlens):
    """function(q, k, v) -> (out, lse) of (1, tokens, heads, head_dim), for each sequence, and nothing elsewhere."""

    def packed(q, k, v):
        out, lse = torch.zeros_like(q), q.new_full((q.shape[1], len(q)), -torch.inf)
        for first, last in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
            if last > first:
                o, s = function(*(x[None, first:last] for x in (q, k, v)))
                out, lse = out.index_copy(0, torch.arange(first, last, device=q.device), o[0]), lse.clone()
                lse[:, first:last] = s[0]
        return out, lse

    return packed


def check(case, dtype, device="cpu", through_lse=True, lse_floor=1e-5):
    lengths, heads, head_dim, *longest = case
    q, k, v, cu_seqlens = make(lengths, heads, head_dim, dtype, device)
    longest, scale, end = (longest or [max(lengths)])[0], head_dim**-0.5, sum(lengths)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(q.shape, generator=generator).to(device, dtype)]
    if through_lse:
        grads.append(torch.randn(heads, len(q), generator=generator).to(device))
    definition = one_by_one(lambda *x: attention_oracle.definition(*x, scale), cu_seqlens)
    exact, exact_grads = gradients(definition, [x.double() for x in (q, k, v)], grads)
    theirs, their_grads = gradients(definition, (q, k, v), grads)
    ours, our_grads = gradients(
        lambda q, k, v: attention_varlen(q, k, v, cu_seqlens, longest, return_lse=True), (q, k, v), grads
    )
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    assert (ours[0][end:] == 0).all() and (ours[1][:, end:] == -torch.inf).all()
    within(ours[0][:end], exact[0][:end], error(theirs[0][:end], exact[0][:end]), "out")
    assert error(ours[1][:, :end], exact[1][:, :end]) < lse_floor
    # What is stored of the output, and P and dS as operands of products, are rounded to the dtype.
    rounded = 0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for name, grad, their, exact_grad in zip("qkv", our_grads, their_grads, exact_grads):
        assert (grad[end:] == 0).all()
        within(grad[:end], exact_grad[:end], error(their[:end], exact_grad[:end]), f"grad {name}", rounded, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case, dtype):
    check(case, dtype, lse_floor=1e-5 if dtype == torch.float32 else 1e-4)  # PyTorch's on the CPU


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_interpreted(case, dtype):
    check(case, dtype)


def launch_with(q, k, v, cu_seqlens, longest):
    """The kernels, unchecked, as on a GPU: output, lse and the gradients of their sums."""
    from fastdeit.kernels.attention.triton_varlen import varlen_backward, varlen_forward

    out, lse = torch.zeros(q.shape, dtype=q.dtype), torch.full((q.shape[1], len(q)), -torch.inf)
    varlen_forward(q, k, v, cu_seqlens, longest, 0.25, out, lse)
    grads = tuple(torch.zeros(q.shape, dtype=q.dtype) for _ in range(3))
    varlen_backward(torch.ones_like(out), q, k, v, cu_seqlens, out, lse, longest, 0.25, torch.ones_like(lse), grads)
    return out, lse, *grads


@pytest.mark.interpreter
def test_max_seqlen_of_the_kernels_is_a_hint():
    q, k, v, cu_seqlens = make((70, 3), 1, 16, torch.float32)
    expected = launch_with(q, k, v, cu_seqlens, 70)
    for longest in (0, 5, 40, 500):
        for found, wanted in zip(launch_with(q, k, v, cu_seqlens, longest), expected):
            assert torch.equal(found, wanted)


@pytest.mark.interpreter
def test_the_kernels_touch_no_memory_of_others_whatever_cu_seqlens_says():
    from memory_watch import memory_watch

    q, k, v, _ = make((40,), 2, 16, torch.float32, unused=0)
    said = ([0, 17, 40], [-5, 17, 2**30], [0, 60, 40, 2**31 - 2], [2**31 - 2, -(2**31), 9])
    for cu_seqlens in [torch.tensor(numbers, dtype=torch.int32) for numbers in said]:
        with memory_watch():
            results = launch_with(q, k, v, cu_seqlens, 33)
        assert not any(x.isnan().any() for x in results)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", [*CASES, ((197, 785, 50, 1), 12, 64), ((300, 20), 2, 64, 128)], ids=str)
def test_kernels_on_gpu(case, dtype):
    check(case, dtype, "cuda")


each_path = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", id="reference"),
        pytest.param("cpu", id="interpreted", marks=pytest.mark.interpreter),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)


@each_path
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
@pytest.mark.parametrize("unused", [0, 2])
def test_no_sequence_with_tokens(lengths, unused, device):
    q, k, v, cu_seqlens = make(lengths, 2, 16, torch.float32, device, unused)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention_varlen(*leaves, cu_seqlens, 0, return_lse=True)
    assert out.shape == q.shape and (out == 0).all() and (lse == -torch.inf).all()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert torch.equal(grad, torch.zeros(q.shape, device=device))


@each_path
@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
def test_logits_far_below_zero(device):
    """Of which exp(-lse), the weight of a key of logit 0 that is not there, overflows."""
    q, k, v, cu_seqlens = make((5, 40), 1, 16, torch.float32, device, unused=0)
    q, k = -20 - q.abs(), 20 + k.abs()  # logits of -1,600 and below
    definition = one_by_one(lambda *x: attention_oracle.definition(*x, 0.25), cu_seqlens)
    grad = [torch.ones(q.shape, device=device)]
    exact, exact_grads = gradients(definition, [x.double() for x in (q, k, v)], grad)
    ours, grads = gradients(lambda *x: attention_varlen(*x, cu_seqlens, 40, return_lse=True), (q, k, v), grad)
    for found, expected in zip((*ours, *grads), (*exact, *exact_grads)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-2)


def test_gradcheck():
    q, k, v, cu_seqlens = make((3, 0, 4), 2, 16, torch.float64, unused=0)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.autograd.gradcheck(lambda *x: attention_varlen(*x, cu_seqlens, 4, return_lse=True), leaves)


def test_opcheck():
    q, k, v, cu_seqlens = make((3, 0, 4), 2, 16, torch.float32, unused=0)
    out, lse = torch.ops.fastdeit.attention_varlen(q, k, v, cu_seqlens, 4, 0.25)
    torch.library.opcheck(torch.ops.fastdeit.attention_varlen, (q, k, v, cu_seqlens, 4, 0.25))
    arguments = (torch.ones_like(out), q, k, v, cu_seqlens, out, lse, 4, 0.25, None)
    torch.library.opcheck(torch.ops.fastdeit.attention_varlen_backward, arguments)


def test_compiles_without_a_graph_break():
    q, k, v, _ = make((3, 0, 4), 2, 16, torch.float32, unused=0)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def loss(q, k, v, cu_seqlens, longest):
        return attention_varlen(q, k, v, cu_seqlens, longest).square().sum()

    compiled_loss = torch.compile(loss, fullgraph=True)
    for lengths in ((3, 0, 4), (1, 6), (2, 5)):
        arguments = edges(lengths), max(lengths)
        compiled = torch.autograd.grad(compiled_loss(*leaves, *arguments), leaves)
        for ours, eager in zip(compiled, torch.autograd.grad(loss(*leaves, *arguments), leaves)):
            torch.testing.assert_close(ours, eager)


def test_flops_are_those_of_the_sequences():
    q, k, v, cu_seqlens = make((3, 0, 4), 2, 16, torch.float32, unused=0)
    with FlopCounterMode(display=False) as counter:
        attention_varlen(q.requires_grad_(), k, v, cu_seqlens, 4).sum().backward()
    assert counter.get_total_flops() == 7 * 2 * 2 * 16 * (9 + 16)


def test_torch_func_and_autocast():
    q, k, v, cu_seqlens = make((3, 4), 2, 16, torch.float32, unused=0)
    grad = torch.func.grad(lambda q: attention_varlen(q, k, v, cu_seqlens, 4).square().sum())(q)
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(attention_varlen(leaf, k, v, cu_seqlens, 4).square().sum(), leaf)
    torch.testing.assert_close(grad, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_varlen(q, k, v, cu_seqlens, 4).dtype == torch.bfloat16


def test_second_derivative_is_refused():
    q, k, v, cu_seqlens = make((3, 4), 2, 16, torch.float32, unused=0)
    q = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(attention_varlen(q, k, v, cu_seqlens, 4).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_varlen cannot be differentiated twice"):
        grad.sum().backward()


Q, BROAD = torch.zeros(7, 2, 16), torch.zeros(1, 1, 16).expand(7, 2**20, 16)


@pytest.mark.parametrize(
    "q, k, lengths, longest, message",
    [
        (Q[None], Q[None], (3, 4), 4, r"total_tokens, heads, head_dim.*fastdeit\.kernels\.attention"),
        (Q, Q[:6], (3, 4), 4, "all the same"),
        (Q, Q.half(), (3, 4), 4, "share dtype and device"),
        (Q.int(), Q.int(), (3, 4), 4, "not torch.int32"),
        (Q[..., :15], Q[..., :15], (3, 4), 4, "head_dim 16 to 128 in steps of 8, not 15"),
        (Q, Q, edges((3, 4)).long(), 4, "int32 on cpu, but is .* torch.int64"),
        (Q, Q, edges((3, 4))[None], 4, r"\(sequences \+ 1,\)"),
        (Q, Q, edges((3, 4))[:0], 4, r"\(sequences \+ 1,\)"),
        (Q, Q, (3, 4), torch.tensor(4), "a number of Python's"),
        (Q, Q, (3, 4), -1, "0 or more"),
        (Q, Q, (3, 5), 5, "end at 7"),
        (Q, Q, edges((3, 4)) + 1, 4, "begin with 0"),
        (Q, Q, torch.tensor([0, 5, 3], dtype=torch.int32), 5, "never fall"),
        (Q, Q, (3, 4), 3, "max_seqlen = 3"),
        (BROAD, BROAD, (3, 4), 4, "Make two"),
    ],
    ids=range(15),
)
def test_what_does_not_fit_is_said_in_words(q, k, lengths, longest, message):
    cu_seqlens = lengths if isinstance(lengths, torch.Tensor) else edges(lengths)
    with pytest.raises(ValueError, match=message):
        attention_varlen(q, k, k, cu_seqlens, longest)
