"""mlp against float64: our error is at most twice PyTorch's own in the same dtype, and a floor."""

import pytest
import torch
import torch.nn.functional as F

from fastdeit.kernels import backend, mlp
from fastdeit.kernels.mlp.api import _mlp, _mlp_backward, has_kernels

NAMES = ("x", "weight1", "bias1", "weight2", "bias2")
# x's shape and the hidden width. Those of the kernels: rows that fill no tile, one row, several tiles; one block of the
# hidden width's, several; one chunk of the width, two and three.
ANY = [((3, 5, 24), 40), ((7, 10), 4), ((2, 3, 192), 768)]
KERNELS = [((1, 1, 64), 64), ((2, 37, 64), 256), ((65, 128), 192), ((3, 23, 192), 128)]
HALF = (torch.float16, torch.bfloat16)


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with NaN before and after them in memory: a read past an edge shows."""
    buffer = torch.full((tensor.numel() + 256,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    middle = buffer[128:-128].view(tensor.shape)
    middle.copy_(tensor)
    return middle


def random_inputs(case, dtype, device="cpu", bias_dtype=None):
    """The operation's tensors by name, and the gradient that comes in; the hidden state is of the order of 1."""
    shape, hidden = case
    width = shape[-1]
    generator = torch.Generator().manual_seed(sum(shape) + hidden)
    shapes = dict(zip((*NAMES, "grad"), (shape, (hidden, width), (hidden,), (width, hidden), (width,), shape)))
    drawn = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in shapes.items()}
    drawn["weight1"] *= 2 * width**-0.5
    drawn["weight2"] *= hidden**-0.5
    dtypes = dict.fromkeys(("bias1", "bias2"), bias_dtype or dtype)
    inputs = {name: poisoned(tensor.to(dtypes.get(name, dtype)).to(device)) for name, tensor in drawn.items()}
    return inputs, inputs.pop("grad")


def definition(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def run(function, inputs, grad):
    """The result and the gradients by name."""
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    y = function(**inputs)
    y.backward(grad)
    return {"y": y.detach()} | {f"d_{name}": tensor.grad for name, tensor in inputs.items()}


def exact(inputs, grad):
    return run(definition, {name: tensor.double() for name, tensor in inputs.items()}, grad.double())


def check(case, dtype, device="cpu"):
    inputs, grad = random_inputs(case, dtype, device)
    ours, eager = run(mlp, inputs, grad), run(definition, inputs, grad)
    for name, expected in exact(inputs, grad).items():
        error, allowed = ((side[name].double() - expected).abs().max() for side in (ours, eager))
        floor = 4 * torch.finfo(torch.float32).eps * expected.abs().max()
        assert ours[name].dtype == dtype and ours[name].is_contiguous()
        assert error <= 2 * allowed + floor, f"{name}: error {error:.3g}, eager {allowed:.3g}, floor {floor:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", ANY, ids=str)
def test_within_budget(case, dtype):
    check(case, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_kernel_within_budget(case, dtype):
    check(case, dtype)


@pytest.mark.interpreter
def test_kernel_with_the_tiles_of_other_gpus(monkeypatch):
    from fastdeit.kernels.mlp import triton_kernels

    monkeypatch.setattr(backend, "CPU_ARCHITECTURE", 86)
    assert triton_kernels.backward_tiles(86) != triton_kernels.backward_tiles(90)
    check(((2, 37, 64), 256), torch.float32)


@pytest.mark.interpreter
def test_the_kernels_are_used_where_they_exist(monkeypatch):
    from fastdeit.kernels.mlp import triton_kernels

    seen = []
    for name in ("mlp_triton", "mlp_backward_triton"):
        original = getattr(triton_kernels, name)
        monkeypatch.setattr(triton_kernels, name, lambda *a, n=name, f=original: (seen.append(n), f(*a))[1])
    check(((2, 64), 64), torch.float32)
    assert seen == ["mlp_triton", "mlp_backward_triton"]
    for case in (((2, 256), 64), ((2, 64), 32), ((2, 40), 64)):
        assert not has_kernels(torch.empty(case[0]), torch.empty(case[1], case[0][-1]))
        check(case, torch.float32)
    assert len(seen) == 2


def check_mixed_dtypes(case, half, device="cpu"):
    """Biases in float32 beside half precision, as autocast leaves them: their gradients lose nothing."""
    inputs, grad = random_inputs(case, half, device, bias_dtype=torch.float32)
    ours = run(mlp, inputs, grad)
    for name, expected in exact(inputs, grad).items():
        dtype = torch.float32 if name in ("d_bias1", "d_bias2") else half
        assert ours[name].dtype == dtype, name
        error = (ours[name].double() - expected).abs().max() / expected.abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 2 * torch.finfo(half).eps), name


@pytest.mark.parametrize("half", HALF, ids=str)
def test_mixed_dtypes(half):
    check_mixed_dtypes(ANY[0], half)


@pytest.mark.interpreter
def test_kernel_mixed_dtypes():
    check_mixed_dtypes(KERNELS[1], torch.float16)


def check_strides(case):
    inputs, grad = random_inputs(case, torch.float32)
    across = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in inputs.items()}
    expected = run(mlp, inputs, grad)
    for name, result in run(mlp, across, grad.transpose(0, 1).contiguous().transpose(0, 1)).items():
        torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-6)


def test_strides_do_not_matter():
    check_strides(ANY[0])


@pytest.mark.interpreter
def test_kernel_takes_any_strides():
    check_strides(KERNELS[1])


def test_gradcheck():
    inputs, _ = random_inputs(((2, 3, 4), 6), torch.float64)
    assert torch.autograd.gradcheck(mlp, [tensor.requires_grad_() for tensor in inputs.values()])


def test_opcheck():
    inputs, grad = random_inputs(((6, 8), 12), torch.float32)
    arguments = list(inputs.values())
    torch.library.opcheck(_mlp, arguments)
    torch.library.opcheck(_mlp_backward, [grad, *arguments[:4]])


def test_compiles_without_a_graph_break():
    inputs, grad = random_inputs(((2, 3, 8), 12), torch.float32)
    compiled = run(torch.compile(mlp, fullgraph=True, backend="aot_eager"), inputs, grad)
    for name, expected in run(mlp, inputs, grad).items():
        torch.testing.assert_close(compiled[name], expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_is_that_of_a_linear(compiled):
    inputs, grad = random_inputs(((2, 3, 8), 12), torch.float32)

    def autocast(function):
        def call(**tensors):
            with torch.autocast("cpu", torch.bfloat16):
                return function(**tensors)

        return torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call

    ours, theirs = (run(autocast(function), inputs, grad.bfloat16()) for function in (mlp, definition))
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype == (torch.bfloat16 if name == "y" else torch.float32)
        torch.testing.assert_close(ours[name], expected, rtol=0.03, atol=0.03)


def test_the_hidden_state_is_not_kept():
    inputs, _ = random_inputs(((50, 8), 32), torch.float32)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        mlp(**inputs)
    assert set(kept) <= {tensor.data_ptr() for tensor in inputs.values()}


@pytest.mark.parametrize("trained", [("x",), ("bias1",), ("weight1", "bias2"), ("weight2",)], ids=str)
def test_frozen_parameters(trained):
    inputs, grad = random_inputs(((3, 8), 12), torch.float64)
    expected = exact(inputs, grad)
    for name in trained:
        inputs[name].requires_grad_()
    mlp(**inputs).backward(grad)
    for name, tensor in inputs.items():
        assert (tensor.grad is not None) == (name in trained)
        if name in trained:
            torch.testing.assert_close(tensor.grad, expected[f"d_{name}"])


def test_no_rows():
    inputs, grad = random_inputs(((0, 3, 8), 12), torch.float32)
    results = run(mlp, inputs, grad)
    assert results["d_x"].shape == (0, 3, 8)
    for name in NAMES[1:]:
        assert torch.equal(results[f"d_{name}"], torch.zeros_like(inputs[name]))


GOOD = {"x": (2, 3, 4), "weight1": (6, 4), "bias1": (6,), "weight2": (4, 6), "bias2": (4,)}


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("x", torch.zeros(4), r"x must be \(\.\.\., width\)"),
        ("x", torch.zeros(2, 4, dtype=torch.int32), "float32, float16 or bfloat16"),
        ("weight1", torch.zeros(4, 6), r"weight1 must be \(hidden, 4\)"),
        ("weight2", torch.zeros(6, 4), r"weight2 must be \(4, 6\) for weight1 of \(6, 4\)"),
        ("bias1", torch.zeros(4), r"bias1 must be \(6,\)"),
        ("bias2", torch.zeros(6), r"bias2 must be \(4,\)"),
        ("weight2", torch.zeros(4, 6).half(), "weight2 is torch.float16 and x torch.float32: cast one"),
        ("bias1", torch.zeros(6, device="meta"), "one device"),
    ],
)
def test_bad_input_is_said_in_words(name, wrong, message):
    tensors = {key: torch.zeros(shape) for key, shape in GOOD.items()}
    with pytest.raises(ValueError, match=message):
        mlp(**(tensors | {name: wrong}))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", [*KERNELS, *ANY, ((64, 198, 192), 768), ((8, 198, 384), 1536)], ids=str)
def test_gpu_within_budget(case, dtype):
    check(case, dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("half", HALF, ids=str)
def test_gpu_mixed_dtypes(half):
    check_mixed_dtypes(((4, 198, 192), 768), half, device="cuda")


@pytest.mark.gpu
def test_gpu_gives_the_same_bits_a_hundred_times():
    inputs, grad = random_inputs(((8, 198, 192), 768), torch.bfloat16, "cuda")
    first = run(mlp, inputs, grad)
    for _ in range(100):
        again = run(mlp, inputs, grad)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
def test_gpu_graph_replays_with_new_inputs():
    inputs, grad = random_inputs(((8 * 198, 192), 768), torch.bfloat16, "cuda")
    arguments = list(inputs.values())

    def both_ways():
        return _mlp(*arguments), *_mlp_backward(grad, *arguments[:4])

    both_ways()  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways()
    inputs["x"].neg_(), grad.mul_(2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, both_ways()))
