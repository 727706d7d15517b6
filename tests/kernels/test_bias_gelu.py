"""bias_gelu against float64: our error is at most twice PyTorch's own in the same dtype, and a floor."""

import pytest
import torch
import torch.nn.functional as F

from fastdeit.kernels import bias_gelu
from fastdeit.kernels.bias_gelu.api import _bias_gelu, _bias_gelu_backward

# Widths of DeiT's MLPs and odd ones; rows that fill no tile, one row, and enough for a program to take several tiles.
SIZES = [(1, 1, 17), (3, 5, 100), (2, 65, 192), (1, 17, 1280)]
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with NaN before and after them in memory: a read past an edge shows."""
    buffer = torch.full((tensor.numel() + 256,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    middle = buffer[128:-128].view(tensor.shape)
    middle.copy_(tensor)
    return middle


def random_inputs(size, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(sum(size))
    x, grad = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(size[-1], generator=generator, dtype=torch.float64)
    return [poisoned(tensor.to(dtype).to(device)) for tensor in (3 * x, bias, grad)]


def run(function, x, bias, grad):
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    y = function(x, bias)
    y.backward(grad)
    return {"y": y.detach(), "dx": x.grad, "dbias": bias.grad}


def check_budget(ours, eager, exact, dtype):
    for name, expected in exact.items():
        error, allowed = (ours[name].double() - expected).abs().max(), (eager[name].double() - expected).abs().max()
        floor = 4 * torch.finfo(torch.float32).eps * expected.abs().max()
        assert ours[name].dtype == dtype
        assert error <= 2 * allowed + floor, f"{name}: error {error:.3g}, eager {allowed:.3g}, floor {floor:.3g}"


def check(size, dtype, device="cpu"):
    inputs = random_inputs(size, dtype, device)
    exact = run(lambda x, b: F.gelu(x + b), *(tensor.double() for tensor in inputs))
    check_budget(run(bias_gelu, *inputs), run(lambda x, b: F.gelu(x + b), *inputs), exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_within_budget(size, dtype):
    check(size, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", [*SIZES, (1, 300, 40)], ids=str)
def test_kernel_within_budget(size, dtype, monkeypatch):
    from fastdeit.kernels.bias_gelu import triton_kernels

    monkeypatch.setattr(
        triton_kernels, "PROGRAMS", 8
    )  # few programs: each loops over several tiles, the last has fewer
    check(size, dtype)


@pytest.mark.interpreter
def test_kernel_over_the_whole_range():
    x = torch.cat((torch.linspace(-15, 15, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 3e38, -1e30])))
    ours = run(bias_gelu, x[None], torch.zeros(len(x)), torch.ones(1, len(x)))
    exact = run(lambda x, b: F.gelu(x + b), x[None].double(), torch.zeros(len(x)).double(), torch.ones(1, len(x)))
    for name in ("y", "dx"):
        error = (ours[name].double() - exact[name]).abs() / exact[name].abs().clamp(min=1)
        assert error.max() < 6e-7, name
    # The left tail keeps its digits, which 1 + erf cancels away: in float32 it is 0 there.
    tail = (x > -12) & (x < -6)
    exact_tail = 0.5 * x.double() * torch.special.erfc(-x.double() / 2**0.5)
    tail_error = (ours["y"][0].double() / exact_tail - 1)[tail].abs()
    assert tail_error.max() < 2e-5


@pytest.mark.interpreter
def test_kernel_passes_nan_and_infinity_on():
    x = torch.tensor([[float("nan"), float("inf"), 1.0]])
    y = bias_gelu(x, torch.zeros(3))
    assert y[0, 0].isnan() and y[0, 1] == float("inf") and y[0, 2].isfinite()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_strides_do_not_matter(dtype):
    x, bias, grad = random_inputs((4, 6, 20), dtype)
    expected = run(bias_gelu, x[:, ::2], bias, grad[:, ::2])
    for layout in (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), lambda t: torch.cat((t, t), -1)[..., :20]):
        actual = run(bias_gelu, layout(x)[:, ::2], bias, layout(grad)[:, ::2])
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.interpreter
def test_kernel_takes_any_strides():
    x, bias, grad = random_inputs((4, 6, 20), torch.float32)
    expected = run(bias_gelu, x, bias, grad)
    across = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, grad)]
    actual = run(bias_gelu, across[0], bias, across[1])
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_gradcheck():
    x, bias, _ = random_inputs((2, 3, 5), torch.float64)
    assert torch.autograd.gradcheck(bias_gelu, (x.requires_grad_(), bias.requires_grad_()))


def test_opcheck():
    x, bias, grad = random_inputs((2, 3, 8), torch.float32)
    torch.library.opcheck(_bias_gelu, (x, bias))
    torch.library.opcheck(_bias_gelu_backward, (grad, x.detach(), bias.detach()))


def test_compiles_without_a_graph_break():
    x, bias, grad = random_inputs((2, 3, 8), torch.float32)
    compiled, eager = run(torch.compile(bias_gelu, fullgraph=True), x, bias, grad), run(bias_gelu, x, bias, grad)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name])


def test_no_rows():
    result = run(bias_gelu, torch.empty(0, 8), torch.ones(8), torch.empty(0, 8))
    assert result["dx"].shape == (0, 8) and torch.equal(result["dbias"], torch.zeros(8))


def test_second_derivative_is_refused():
    x = torch.randn(2, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(bias_gelu(x, torch.zeros(4)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="bias_gelu cannot be differentiated twice"):
        dx.sum().backward()


@pytest.mark.parametrize(
    "x, bias, message",
    [
        (torch.zeros(4), torch.zeros(4), "channels"),
        (torch.zeros(2, 4, dtype=torch.int32), torch.zeros(4), "float32, float16 or bfloat16"),
        (torch.zeros(2, 4), torch.zeros(5), r"bias must be \(4,\)"),
        (torch.zeros(2, 4), torch.zeros(4, device="meta"), "one device"),
    ],
)
def test_bad_input_is_said_in_words(x, bias, message):
    with pytest.raises(ValueError, match=message):
        bias_gelu(x, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [*SIZES, (64, 197, 3072)], ids=str)
def test_gpu_within_budget(size, dtype):
    check(size, dtype, device="cuda")


@pytest.mark.gpu
def test_gpu_gives_the_same_bits_a_hundred_times():
    inputs = random_inputs((8, 197, 768), torch.bfloat16, "cuda")
    first = run(bias_gelu, *inputs)
    for _ in range(100):
        again = run(bias_gelu, *inputs)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
def test_gpu_graph_replays_with_new_inputs():
    x, bias, grad = random_inputs((8, 197, 768), torch.bfloat16, "cuda")
    run(bias_gelu, x, bias, grad)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, (dx, dbias) = _bias_gelu(x, bias), _bias_gelu_backward(grad, x, bias)
    x.neg_(), grad.mul_(2)
    graph.replay()
    expected = run(bias_gelu, x, bias, grad)
    assert torch.equal(y, expected["y"]) and torch.equal(dx, expected["dx"]) and torch.equal(dbias, expected["dbias"])
