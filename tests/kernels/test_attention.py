"""attention on the CPU path: meaning, registration with PyTorch, and what it refuses."""

import subprocess
import sys

import pytest
import torch
from attention_oracle import check, definition

from fastdeit.kernels import attention, attention_qkvpacked
from fastdeit.kernels.attention import api, configs, tiles
from fastdeit.kernels.backend import INTERPRETED

# These are about the plain PyTorch path; the interpreter replaces it.
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the CPU path is not taken under TRITON_INTERPRET=1")


def make(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens, head_dim", [(1, 32), (17, 80), (198, 64)])
def test_matches_float64(tokens, head_dim, dtype):
    q, k, v = (make(3, tokens, 2, head_dim, dtype=dtype, seed=i) for i in range(3))
    lse_floor = 1e-6 if dtype == torch.float32 else 1e-4  # PyTorch's own operator, with a fast exp in half precision
    for through_lse in (True, False):
        check(lambda *x: attention(*x, scale=0.2, return_lse=True), q, k, v, 0.2, through_lse, lse_floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_expanded_gradients(dtype):
    q = make(2, 3, 9, 64, dtype=dtype).transpose(1, 2)
    k = make(9, 2, 3, 64, dtype=dtype, seed=1).transpose(0, 1)
    v = make(2, 9, 3, 128, dtype=dtype, seed=2)[..., ::2]
    check(lambda *x: attention(*x, return_lse=True), q, k, v, 0.125, lse_floor=1e-4)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(attention(*leaves).sum(), leaves)  # the gradient of sum is expanded: strides 0
    expected = torch.autograd.grad(definition(*leaves, 0.125)[0].sum(), leaves)
    torch.testing.assert_close(grads, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 5e-2)


def test_packed_is_the_same_function():
    qkv = make(2, 19, 3, 2, 64).requires_grad_()
    out, lse = attention_qkvpacked(qkv, return_lse=True)
    expected_out, expected_lse = attention(*qkv.unbind(2), return_lse=True)
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)
    (grad,) = torch.autograd.grad(out.sin().sum(), qkv)
    (expected,) = torch.autograd.grad(expected_out.sin().sum(), qkv)
    assert grad.shape == qkv.shape and grad.is_contiguous()
    torch.testing.assert_close(grad, expected)


def test_default_scale():
    q, k, v = (make(1, 7, 1, 64, seed=i) for i in range(3))
    torch.testing.assert_close(attention(q, k, v), definition(q, k, v, 0.125)[0])


def test_gradcheck():
    q, k, v = (make(2, 5, 2, 32, dtype=torch.float64, seed=i).requires_grad_() for i in range(3))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, scale=0.3, return_lse=True), (q, k, v))
    q, k, v = (make(1, n, 2, 16, dtype=torch.float64, seed=n).requires_grad_() for n in (2, 5, 5))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, return_lse=True), (q, k, v))
    qkv = make(1, 4, 3, 1, 32, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention_qkvpacked(x, return_lse=True), (qkv,))


def test_gradient_of_lse_alone():
    q, k, v = (make(1, 6, 1, 32, dtype=torch.float64, seed=i).requires_grad_() for i in range(3))
    grads = torch.autograd.grad(attention(q, k, v, return_lse=True)[1].sum(), (q, k, v))
    expected = torch.autograd.grad(definition(q, k, v, 32**-0.5)[1].sum(), (q, k), allow_unused=True)
    torch.testing.assert_close(grads[:2], expected)
    assert not grads[2].any()


def test_opcheck():
    q, k, v = (make(2, 5, 2, 32, seed=i) for i in range(3))
    qkv = make(2, 5, 3, 2, 32)
    out, lse = attention(q, k, v, return_lse=True)
    ops = torch.ops.fastdeit
    torch.library.opcheck(ops.attention, (q, k, v, 0.3))
    torch.library.opcheck(ops.attention, (q[:, :2], k, v, 0.3))
    torch.library.opcheck(ops.attention_qkvpacked, (qkv, 0.3))
    torch.library.opcheck(ops.attention_backward, (out, q, k, v, out, lse, 0.3, lse))
    torch.library.opcheck(ops.attention_backward, (out, q, k[:, :2], v[:, :2], out, lse, 0.3, lse))
    torch.library.opcheck(ops.attention_qkvpacked_backward, (out, qkv, out, lse, 0.3, None))


def test_compiles_where_it_is_left_to_pytorch(monkeypatch):
    """What decides is a constant to torch.compile, however it decides."""
    decide = torch.compiler.assume_constant_result(lambda device, dtype: dtype == torch.float32)
    monkeypatch.setattr(api, "left_to_pytorch", decide)
    torch._dynamo.reset()
    compiled = torch.compile(attention_qkvpacked, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.float64):
        qkv = make(2, 5, 3, 2, 32, dtype=dtype)
        torch.testing.assert_close(compiled(qkv), attention_qkvpacked(qkv))


def test_compiles_without_a_graph_break():
    projection = torch.nn.Linear(64, 192)

    def model(x):
        return attention_qkvpacked(projection(x).view(2, 9, 3, 2, 32)).flatten(2).square().mean()

    x = make(2, 9, 64)
    expected = torch.autograd.grad(model(x), projection.parameters())
    grads = torch.autograd.grad(torch.compile(model, fullgraph=True)(x), projection.parameters())
    torch.testing.assert_close(grads, expected)


def test_autocast_casts_mixed_inputs():
    q, k = make(1, 5, 1, 32), make(1, 5, 1, 32, seed=1)  # as a q_norm in float32 leaves them
    v = make(1, 5, 1, 32, dtype=torch.bfloat16, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v).dtype == torch.bfloat16


def test_autocast_leaves_the_arithmetic_alone():
    """Products of the plain formulas are in float32 inside autocast too, forward and backward."""
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            qkv = make(2, 9, 3, 2, 32, dtype=torch.bfloat16).requires_grad_()
            out, lse = attention_qkvpacked(qkv, return_lse=True)
            grads.append(torch.autograd.grad(out.float().sin().sum() + lse.sum(), qkv)[0])
    assert torch.equal(*grads)


def test_second_derivative_is_refused():
    qkv = make(1, 3, 3, 1, 32).requires_grad_()
    (grad,) = torch.autograd.grad(attention_qkvpacked(qkv).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


def test_static_tiles_cover_every_length():
    """The kernels mask only the last tile, so all before it must be whole"""
    for config in (configs.forward_config(90, 256, 64, torch.half), configs.forward_config(90, 4096, 64, torch.half)):
        for tokens in range(1, 257 if config.keys == "resident" else 4097):
            tiles = config.tiles(tokens)
            looped = 0 if config.keys == "resident" else (tokens - 1) // config.block_n * config.block_n
            assert looped + sum(tiles[:-1]) < tokens <= looped + sum(tiles)
            assert all(tile & (tile - 1) == 0 and tile >= 16 for tile in tiles)
    assert configs.forward_config(90, 198, 64, torch.half).tiles(198) == (64, 64, 64, 16)
    assert configs.forward_config(80, 198, 64, torch.half).tiles(198) == (128, 64, 16)
    assert configs.forward_config(90, 578, 64, torch.half).tiles(578) == (16,)


def test_tf32_follows_pytorch():
    """By the old switch, and by the new one, after which reading the old one raises. In a process of its own."""
    script = """
import torch
from fastdeit.kernels.backend import dot_precision
x = torch.zeros(1)
assert dot_precision(x) == "ieee"
torch.set_float32_matmul_precision("high")
assert dot_precision(x) == "tf32" and dot_precision(x.half()) == "ieee"
torch.backends.cuda.matmul.fp32_precision = "ieee"
assert dot_precision(x) == "ieee"
torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"
assert dot_precision(x) == "tf32"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ([make(5, 1, 32)] * 3, "batch, tokens, heads, head_dim"),
        ([make(1, 5, 1, 32), make(1, 6, 1, 32), make(1, 5, 1, 32)], "k and v must have the same tokens"),
        ([make(1, 5, 4, 32), *2 * [make(1, 5, 2, 32)]], "may differ in their tokens only.*grouped heads"),
        ([make(1, 5, 1, 32), make(1, 5, 1, 32), make(1, 5, 1, 32, dtype=torch.float16)], "share dtype and device"),
        ([make(1, 5, 1, 32), make(1, 5, 1, 32).to("meta"), make(1, 5, 1, 32)], "share dtype and device"),
        ([make(1, 5, 1, 20)] * 3, "head_dim 16 to 128 in steps of 8, not 20"),
        ([make(1, 5, 1, 136)] * 3, "not 136"),
        ([make(1, 1, 1, 128).expand(1, 2**24, 1, 128)] * 3, "1 to 5592149 tokens, not 16777216"),
        ([make(1, 0, 1, 32)] * 3, "tokens, not 0"),
        ([make(1, 5, 1, 32).int()] * 3, "not torch.int32"),
    ],
)
def test_refuses(tensors, message):
    with pytest.raises(ValueError, match=message):
        attention(*tensors)


@pytest.mark.parametrize("shape", [(1, 5, 96), (1, 5, 2, 1, 32), (1, 3, 5, 1, 32)])
def test_refuses_packed(shape):
    with pytest.raises(ValueError, match=r"qkv must be \(batch, tokens, 3, heads, head_dim\)"):
        attention_qkvpacked(make(*shape))


def test_left_to_pytorch(monkeypatch):
    """Where PyTorch's own function is better, it is called, unless lse is wanted; the result has our layout."""
    q, k, v = (make(2, n, 2, 32, seed=n).requires_grad_() for n in (3, 5, 5))
    expected = torch.autograd.grad(attention(q, k, v, scale=0.3).sin().sum(), (q, k, v))
    qkv = make(2, 5, 3, 2, 32)
    packed = attention_qkvpacked(qkv, scale=0.3)
    monkeypatch.setattr(api, "left_to_pytorch", lambda device, dtype: True)
    monkeypatch.setattr(api, "_attend", None)
    monkeypatch.setattr(api, "_attend_packed", None)
    out = attention(q, k, v, scale=0.3)
    assert out.is_contiguous()
    torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), (q, k, v)), expected)
    torch.testing.assert_close(attention_qkvpacked(qkv, scale=0.3), packed)
    with pytest.raises(TypeError):
        attention(q, k, v, return_lse=True)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_refuses_scale(scale):
    with pytest.raises(ValueError, match="positive and finite"):
        attention_qkvpacked(make(1, 5, 3, 1, 32), scale=scale)


def test_tiles_can_be_replaced():
    """For one shape, until the table's are asked for again; by names that are all different."""
    shape = tiles.Shape(90, 198, 198, 64, torch.bfloat16)
    forward, backward = tiles.forward_candidates(shape), tiles.backward_candidates(shape, 1024)
    assert next(iter(forward.values())) == tiles.forward(shape) == configs.forward_config(90, 198, 64, torch.bfloat16)
    assert next(iter(backward.values())) == tiles.backward(shape, 1024)
    assert all(config.name == name for name, config in (forward | backward).items())
    assert len(forward) > 5 and len(backward) > 5
    other, another = list(forward.values())[-1], list(backward.values())[-1]
    try:
        tiles.use(shape, forward=other)
        assert tiles.forward(shape) == other != tiles.forward(shape._replace(queries=2))
        assert tiles.backward(shape, 1024) != another
        tiles.use(shape, forward=other, backward=another)
        assert (tiles.forward(shape), tiles.backward(shape, 1024)) == (other, another)
    finally:
        tiles.use(shape)
    assert tiles.forward(shape) == next(iter(forward.values()))


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("tokens, head_dim", [(1, 16), (198, 64), (257, 64), (300, 32), (578, 80), (2000, 128)])
def test_candidates_are_such_as_the_kernels_take(arch, tokens, head_dim):
    shape = tiles.Shape(arch, tokens, tokens, head_dim, torch.float16)
    for config in tiles.forward_candidates(shape).values():
        assert config.keys != "resident" or sum(config.tiles(tokens)) <= 256
    for config in tiles.backward_candidates(shape, 1024).values():
        if config.one is not None:
            assert config.one.keys % config.one.queries == 0
        else:
            assert config.q.queries % config.kv.queries == 0
    assert len(tiles.forward_candidates(shape._replace(dtype=torch.float32))) == 1
