"""attention_varlen against float64, sequence by sequence: on the CPU, in the interpreter, compiled on a GPU.

tests/ptx runs the compiled code on the CPU. The budget is that of attention_oracle.py.
"""

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastdeit.kernels import attention_varlen
from tests.kernels import attention_oracle
from tests.kernels.attention_oracle import error, gradients, within

CASES = [  # lengths, heads, head_dim; then, where they are others, those of the keys
    ((37, 5, 0, 64), 2, 32),
    ((1, 70), 3, 72),
    ((0, 0, 33, 0), 1, 16),
    ((65,), 1, 128),
    ((37, 5, 0, 1), 2, 48, (3, 0, 20, 70)),  # the second has no key, the third no query
]
HALF = [torch.float16, torch.bfloat16]
UNUSED = 3  # tokens after the last sequence


def edges(lengths, device="cpu"):
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32, device=device)


def make(lengths, heads, head_dim, dtype, device="cpu", unused=UNUSED, keys=None):
    """q, k, v between NaN, each with strides of its own, and cu_seqlens; that of the keys, too, where they differ."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tensors = []
    for rows, of in ((1, lengths), (2, keys or lengths), (3, keys or lengths)):
        total = sum(of) + unused
        around = torch.full((total + 2, rows, heads + 1, head_dim + 16), float("nan"), dtype=dtype, device=device)
        view = around[1:-1, rows - 1, :heads, 8:-8]
        view.copy_(torch.randn(view.shape, generator=generator))
        if unused:
            view[-unused:] = torch.nan  # which nobody may read
        tensors.append(view)
    return *tensors, edges(lengths, device), *(() if keys is None else (edges(keys, device),))


def one_by_one(function, cu_seqlens, cu_seqlens_k=None):
    """function(q, k, v) -> (out, lse) of (1, tokens, heads, head_dim), for each sequence, and nothing elsewhere."""
    of_q, of_k = (pairwise((cu_seqlens if cu is None else cu).tolist()) for cu in (None, cu_seqlens_k))
    parts = [(i, j) for i, j in zip(of_q, of_k) if i[0] < i[1] and j[0] < j[1]]

    def packed(q, k, v):
        out, lse = torch.zeros_like(q), q.new_full((q.shape[1], len(q)), -torch.inf)
        for i, j in parts:
            o, s = function(q[None, slice(*i)], k[None, slice(*j)], v[None, slice(*j)])
            out, lse = out.index_copy(0, torch.arange(*i, device=q.device), o[0]), lse.clone()
            lse[:, slice(*i)] = s[0]
        return out, lse

    return packed


def check(case, dtype, device="cpu", lse_floor=1e-5, longest=None):
    lengths, heads, head_dim, *keys = case
    q, k, v, *cu_seqlens = make(lengths, heads, head_dim, dtype, device, keys=keys[0] if keys else None)
    scale, longest = head_dim**-0.5, longest or max(lengths)
    options = {"cu_seqlens_k": cu_seqlens[1], "max_seqlen_k": max(keys[0])} if keys else {}
    generator = torch.Generator().manual_seed(1)
    definition = one_by_one(lambda *x: attention_oracle.definition(*x, scale), *cu_seqlens)
    inside = definition(*(x.double() for x in (q, k, v)))[1][0] > -torch.inf  # queries that have keys
    grads = [torch.randn(x, generator=generator).to(device) for x in (q.shape, (heads, len(q)))]
    exact, exact_grads = gradients(definition, [x.double() for x in (q, k, v)], grads)
    theirs, their_grads = gradients(definition, (q, k, v), grads)
    ours, our_grads = gradients(
        lambda q, k, v: attention_varlen(q, k, v, cu_seqlens[0], longest, return_lse=True, **options), (q, k, v), grads
    )
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    assert (ours[0][~inside] == 0).all() and (ours[1][:, ~inside] == -torch.inf).all()
    within(ours[0][inside], exact[0][inside], error(theirs[0][inside], exact[0][inside]), "out")
    assert error(ours[1][:, inside], exact[1][:, inside]) < lse_floor
    # What is stored of the output, and P and dS as operands of products, are rounded to the dtype.
    rounded = 0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    ends = sum(lengths), *2 * (sum(keys[0] if keys else lengths),)
    for name, end, grad, their, exact_grad in zip("qkv", ends, our_grads, their_grads, exact_grads):
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
    varlen_forward(q, k, v, cu_seqlens, cu_seqlens, longest, 0.25, out, lse)
    grads = tuple(torch.zeros(q.shape, dtype=q.dtype) for _ in range(3))
    cu, ones = (cu_seqlens, cu_seqlens), (torch.ones_like(out), torch.ones_like(lse))
    varlen_backward(ones[0], q, k, v, *cu, out, lse, longest, longest, 0.25, ones[1], grads)
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
@pytest.mark.parametrize("case", [*CASES, ((197, 785, 50, 1), 12, 64), ((1, 1, 1), 8, 72, (729, 300, 5))], ids=str)
def test_kernels_on_gpu(case, dtype):
    check(case, dtype, "cuda")


@pytest.mark.gpu
def test_max_seqlen_is_a_hint_on_gpu():
    check(((300, 20), 2, 64), torch.bfloat16, "cuda", longest=128)


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


@pytest.mark.parametrize("keys", [None, (2, 5, 0)])
def test_opcheck(keys):
    q, k, v, *cu_seqlens = make((3, 0, 4), 2, 16, torch.float32, unused=0, keys=keys)
    where = *(*cu_seqlens, None)[:2], 4, 5
    out, lse = torch.ops.fastdeit.attention_varlen(q, k, v, *where, 0.25)
    torch.library.opcheck(torch.ops.fastdeit.attention_varlen, (q, k, v, *where, 0.25))
    arguments = (torch.ones_like(out), q, k, v, *where[:2], out, lse, *where[2:], 0.25, None)
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
    for keys, products in ((None, 9 + 16), ((2, 5, 1), 3 * 2 + 4)):
        q, k, v, *cu_seqlens = make((3, 0, 4), 2, 16, torch.float32, unused=0, keys=keys)
        options = {} if keys is None else {"cu_seqlens_k": cu_seqlens[1], "max_seqlen_k": 5}
        with FlopCounterMode(display=False) as counter:
            attention_varlen(q.requires_grad_(), k, v, cu_seqlens[0], 4, **options).sum().backward()
        assert counter.get_total_flops() == 7 * 2 * 2 * 16 * products


@pytest.mark.parametrize("edges_mapped", [False, True])
def test_vmap_is_a_loop(edges_mapped):
    """Over queries and values, the keys shared; sequences of the same lengths, or of others each time."""
    q, k, v = (torch.randn(3, 7, 2, 16, dtype=torch.float64) for _ in range(3))
    cu_seqlens = torch.stack([edges(lengths) for lengths in ((3, 4), (0, 6), (5, 2))])
    if not edges_mapped:
        cu_seqlens = cu_seqlens[:1].expand(3, -1)

    def loss(q, k, v, cu_seqlens):
        out, lse = attention_varlen(q, k, v, cu_seqlens, 6, return_lse=True)
        return out.sin().sum() + lse[:, :6].sum()

    function = torch.func.grad_and_value(loss, (0, 1, 2))
    arguments = (q.movedim(0, 1), k[0], v, cu_seqlens if edges_mapped else cu_seqlens[0])
    mapped = torch.vmap(function, (1, None, 0, 0 if edges_mapped else None))(*arguments)
    for i in range(3):
        grads, value = function(q[i], k[0], v[i], cu_seqlens[i])
        torch.testing.assert_close(mapped[1][i], value)
        for ours, expected in zip(mapped[0], grads):
            torch.testing.assert_close(ours[i], expected)


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
SEVEN, BOTH = edges((3, 4)), {"cu_seqlens_k": edges((6, 0)), "max_seqlen_k": 6}


@pytest.mark.parametrize(
    "q, k, cu_seqlens, longest, options, message",
    [
        (Q[None], Q[None], SEVEN, 4, {}, r"total_tokens, heads, head_dim.*fastdeit\.kernels\.attention"),
        (Q, Q[:6], SEVEN, 4, {}, "all the same unless cu_seqlens_k"),
        (Q, Q[:6, :1], SEVEN, 4, BOTH, "all the same unless"),
        (Q, Q.half(), SEVEN, 4, {}, "share dtype and device"),
        (Q.int(), Q.int(), SEVEN, 4, {}, "not torch.int32"),
        (Q[..., :15], Q[..., :15], SEVEN, 4, {}, "head_dim 16 to 128 in steps of 8, not 15"),
        (Q, Q, SEVEN.long(), 4, {}, "int32 on cpu, but is .* torch.int64"),
        (Q, Q, SEVEN[None], 4, {}, r"\(sequences \+ 1,\)"),
        (Q, Q, SEVEN[:0], 4, {}, r"\(sequences \+ 1,\)"),
        (Q, Q, SEVEN, torch.tensor(4), {}, "a number of Python's"),
        (Q, Q, SEVEN, -1, {}, "0 or more"),
        (Q, Q, edges((3, 5)), 5, {}, "end at 7"),
        (Q, Q, SEVEN + 1, 4, {}, "begin with 0"),
        (Q, Q, torch.tensor([0, 5, 3], dtype=torch.int32), 5, {}, "never fall"),
        (Q, Q, SEVEN, 3, {}, "max_seqlen = 3"),
        (BROAD, BROAD, SEVEN, 4, {}, "Make two"),
        (Q, Q, SEVEN, 4, {"max_seqlen_k": 4}, "belong together"),
        (Q, Q, SEVEN, 4, BOTH | {"cu_seqlens_k": SEVEN[:2]}, "as many sequences as cu_seqlens, 2, but tells of 1"),
        (Q, Q, SEVEN, 4, BOTH | {"max_seqlen_k": 5}, r"cu_seqlens_k must .* max_seqlen_k = 5, but it is \[0, 6, 6\]"),
        (Q, Q[:5], SEVEN, 4, BOTH, "end at 5"),
        (Q, Q, SEVEN, 4, BOTH | {"cu_seqlens_k": SEVEN.long()}, "cu_seqlens_k must be .* int32"),
    ],
    ids=range(21),
)
def test_what_does_not_fit_is_said_in_words(q, k, cu_seqlens, longest, options, message):
    with pytest.raises(ValueError, match=message):
        attention_varlen(q, k, k, cu_seqlens, longest, **options)
