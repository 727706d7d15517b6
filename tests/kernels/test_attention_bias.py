"""attention(bias=...) against float64: plain PyTorch on the CPU, the kernels in the interpreter, compiled on a GPU.

tests/ptx runs the compiled code on the CPU. The budget is that of attention_oracle.py; the bias' gradient is a sum of
dS, each rounded as the gradients of q and k are, and has PyTorch's own error in the same dtype twice, too.
"""

import pytest
import torch

from fastdeit.kernels import attention, attention_qkvpacked
from tests.kernels.attention_oracle import error, gradients, within

SHAPES = [  # batch, queries, keys, heads, head_dim, bias' leading dimensions
    (2, 37, 37, 3, 32, (3,)),  # relative positions
    (4, 49, 49, 2, 32, (2, 1)),  # windows, shifted: a mask for each of two, for all heads
    (3, 65, 70, 2, 72, (3, 2)),  # one for each sample and head
    (5, 1, 66, 1, 64, (1, 1)),
    (2, 130, 17, 2, 128, (1,)),
]
HALF = [torch.float16, torch.bfloat16]


def make(batch, queries, keys, heads, head_dim, leading, dtype, device="cpu", bias_dtype=None, seed=0):
    """q, k, v and bias, each within NaN; some keys of the bias are masked."""
    generator = torch.Generator().manual_seed(seed)

    def within_nan(*shape, dtype=dtype):
        around = torch.full([n + 2 for n in shape], float("nan"), dtype=dtype, device=device)
        middle = around[tuple(slice(1, -1) for _ in shape)]
        return middle.copy_(torch.randn(shape, generator=generator))

    q = within_nan(batch, queries, heads, head_dim)
    k, v = (within_nan(batch, keys, heads, head_dim) for _ in range(2))
    bias = within_nan(*leading, queries, keys, dtype=bias_dtype or dtype)
    bias[torch.rand(bias.shape, generator=generator).to(device) < 0.1] = -torch.inf
    bias[..., 0] = 0.5
    return q, k, v, bias


def definition(q, k, v, bias, scale):
    """Output and lse in the dtype given."""
    wide = bias.unsqueeze(0) if bias.ndim == 3 else bias
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale + wide.repeat(len(q) // len(wide), 1, 1, 1).to(q.dtype)
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v), logits.logsumexp(-1)


def check(shape, dtype, device="cpu", bias_dtype=None, lse=True, lse_floor=1e-5):
    inputs = make(*shape, dtype, device, bias_dtype)
    q, _, _, bias = inputs
    scale = q.shape[-1] ** -0.5
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(q.shape, generator=generator).to(device, dtype)]
    if lse:
        grads.append(torch.randn(len(q), q.shape[2], q.shape[1], generator=generator).to(device))
    exact, exact_grads = gradients(lambda *x: definition(*x, scale), [x.double() for x in inputs], grads)
    theirs, their_grads = gradients(lambda *x: definition(*x, scale), inputs, grads)
    ours, our_grads = gradients(lambda q, k, v, bias: attention(q, k, v, bias=bias, return_lse=True), inputs, grads)
    assert ours[0].dtype == dtype and our_grads[3].dtype == bias.dtype and ours[0].is_contiguous()
    within(ours[0], exact[0], error(theirs[0], exact[0]), "out")
    assert error(ours[1], exact[1]) < lse_floor
    # What is stored of the output, and P and dS as operands of products, are rounded to the dtype.
    rounded = 0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for name, ours_, theirs_, exact_ in zip(("q", "k", "v", "bias"), our_grads, their_grads, exact_grads):
        within(ours_.to(dtype), exact_, error(theirs_, exact_), f"grad {name}", rounded, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, torch.float64], ids=str)
def test_on_the_cpu(shape, dtype, bias_dtype):
    """By PyTorch's operators, whose lse is less exact in half precision; by the formulas for a wider bias."""
    check(shape, dtype, bias_dtype=bias_dtype, lse_floor=1e-4 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_bias_that_is_not_trained(shape, turned):
    """Without a gradient of its own PyTorch's backward serves the others, in float32."""
    *inputs, bias = make(*shape, torch.float32)
    bias = bias.transpose(-1, -2).contiguous().transpose(-1, -2) if turned else bias
    wide, grad = bias.double(), [torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))]
    scale = shape[4] ** -0.5
    exact, exact_grads = gradients(lambda *x: definition(*x, wide, scale)[0], [x.double() for x in inputs], grad)
    ours, grads = gradients(lambda *x: attention(*x, bias=bias), inputs, grad)
    for found, expected in zip((*ours, *grads), (*exact, *exact_grads)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_interpreted(shape, dtype):
    check(shape, dtype)


@pytest.mark.interpreter
def test_kernels_take_a_bias_of_another_dtype_and_any_strides():
    check(SHAPES[1], torch.float16, bias_dtype=torch.float32, lse=False)
    q, k, v, bias = make(*SHAPES[0], torch.float32)
    turned = bias.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(attention(q, k, v, bias=turned), attention(q, k, v, bias=bias), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (64, 197, 197, 12, 64, (12,))], ids=str)
def test_kernels_on_gpu(shape, dtype):
    check(shape, dtype, "cuda")


each_path = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", id="reference"),
        pytest.param("cpu", id="interpreted", marks=pytest.mark.interpreter),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)


@each_path
def test_a_row_without_keys_attends_to_nothing(device):
    q, k, v, bias = (x.detach() for x in make(2, 5, 7, 1, 16, (1,), torch.float32, device))
    bias[:, 2] = -torch.inf
    leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
    out, lse = attention(*leaves[:3], bias=leaves[3], return_lse=True)
    assert (out[:, 2] == 0).all() and (lse[..., 2] == -torch.inf).all()
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, 2] == 0).all() and (grads[3][:, 2] == 0).all() and grads[3].abs().sum() > 0
    untrained = torch.autograd.grad(attention(*leaves[:3], bias=bias).square().sum(), leaves[:3])
    torch.testing.assert_close(untrained, grads[:3], rtol=1e-4, atol=1e-6)


@each_path
def test_no_bias_is_a_bias_of_zero(device):
    q, k, v, _ = make(2, 33, 20, 2, 64, (1,), torch.float32, device)
    zero = torch.zeros(1, 33, 20, device=device)
    torch.testing.assert_close(attention(q, k, v, bias=zero), attention(q, k, v), rtol=1e-5, atol=1e-6)


@each_path
def test_packed_is_the_same(device):
    q, k, v, bias = make(4, 17, 17, 2, 16, (2, 2), torch.float32, device)
    qkv = torch.stack((q, k, v), 2).requires_grad_()
    leaves = [x.clone().requires_grad_() for x in (q, k, v, bias, bias)]
    packed = attention_qkvpacked(qkv, bias=leaves[4], return_lse=True)
    apart = attention(*leaves[:3], bias=leaves[3], return_lse=True)
    torch.testing.assert_close(packed, apart, rtol=0, atol=0)
    grads = [
        torch.autograd.grad(out.sin().sum() + lse.sum(), inputs)
        for (out, lse), inputs in ((packed, (qkv, leaves[4])), (apart, leaves[:4]))
    ]
    torch.testing.assert_close(grads[0][0], torch.stack(grads[1][:3], 2), rtol=0, atol=0)
    torch.testing.assert_close(grads[0][1], grads[1][3], rtol=0, atol=0)
    assert grads[0][0].is_contiguous()


@pytest.mark.parametrize("bias_dim", [None, 0, 3], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_vmap_is_a_loop(bias_dim, trained):
    """Of entries of a batch that share a bias in turn; the bias shared, or one for each call."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 4, 5, 2, 16, dtype=torch.float64, generator=generator) for _ in range(3))
    bias = torch.randn(3, 2, 1, 5, 5, dtype=torch.float64, generator=generator)
    if bias_dim is None:
        bias = bias[:1].expand(3, -1, -1, -1, -1)

    def loss(q, k, v, bias):
        out, lse = attention(q, k, v, bias=bias, return_lse=True)
        return out.sin().sum() + lse.square().sum()

    function = torch.func.grad_and_value(loss, (0, 1, 2, 3) if trained else (0, 1, 2))
    mapped_bias = bias[0] if bias_dim is None else bias.movedim(0, bias_dim)
    grads, value = torch.vmap(function, (2, 0, None, bias_dim))(q.movedim(0, 2), k, v[0], mapped_bias)
    for i in range(3):
        expected, of_one = function(q[i], k[i], v[0], bias[i])
        torch.testing.assert_close(value[i], of_one)
        for ours, theirs in zip(grads, expected):
            torch.testing.assert_close(ours[i], theirs)


def test_gradcheck():
    inputs = [x.clone().requires_grad_() for x in make(4, 3, 5, 2, 16, (2, 2), torch.float64)]
    torch.autograd.gradcheck(lambda q, k, v, bias: attention(q, k, v, bias=bias, return_lse=True), inputs)


@pytest.mark.parametrize("trained", [False, True])
def test_opcheck(trained):
    q, k, v, bias = (x.clone() for x in make(2, 9, 9, 2, 16, (1, 2), torch.float32))
    out, lse = torch.ops.fastdeit.attention_bias(q, k, v, bias, 0.25)
    torch.library.opcheck(torch.ops.fastdeit.attention_bias, (q, k, v, bias, 0.25))
    arguments = (torch.ones_like(out), q, k, v, bias, out, lse, 0.25, None, trained)
    torch.library.opcheck(torch.ops.fastdeit.attention_bias_backward, arguments)


def test_compiles_without_a_graph_break():
    inputs = [x.clone().requires_grad_() for x in make(2, 9, 9, 2, 16, (2,), torch.float32)]

    def loss(q, k, v, bias):
        return attention(q, k, v, bias=bias).square().sum()

    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*inputs), inputs)
    for ours, eager in zip(compiled, torch.autograd.grad(loss(*inputs), inputs)):
        torch.testing.assert_close(ours, eager)


def test_second_derivative_is_refused():
    q, k, v, bias = (x.clone().requires_grad_() for x in make(1, 3, 3, 1, 16, (1,), torch.float32))
    (grad,) = torch.autograd.grad(attention(q, k, v, bias=bias).sum(), bias, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 4), (3, 3, 4), (3, 1, 3, 4), (0, 1, 3, 4)], ids=str)
def test_a_shape_that_does_not_fit_is_said_in_words(shape):
    q, k = torch.zeros(4, 3, 2, 16), torch.zeros(4, 4, 2, 16)
    if shape == (2, 3, 4):
        attention(q, k, k, bias=torch.zeros(shape))
        return
    with pytest.raises(ValueError, match=r"\(2, 3, 4\), or have a number of batch entries before it that divides 4"):
        attention(q, k, k, bias=torch.zeros(shape))


def test_a_mask_is_no_bias():
    q = torch.zeros(1, 3, 2, 16)
    with pytest.raises(ValueError, match="masked_fill"):
        attention(q, q, q, bias=torch.ones(1, 3, 3, dtype=torch.bool))
