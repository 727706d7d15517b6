"""add_layer_norm against float64: our error is at most twice PyTorch's own in the same dtype, and a floor."""

import pytest
import torch
import torch.nn.functional as F

from fastdeit.kernels import add_layer_norm
from fastdeit.kernels.add_layer_norm.api import _add_layer_norm, _add_layer_norm_backward

# Widths of DeiT (192, 768) and of ViT-H (1280), odd and narrow ones; token counts that fill no tile, one row.
SIZES = [(1, 1, 17), (3, 5, 100), (2, 33, 192), (2, 7, 768), (1, 3, 1280), (2, 3, 6)]
TENSORS = ("x", "residual", "weight", "bias", "layer_scale", "drop_path_scale")
BRANCHES = {"plain": (), "scaled": ("layer_scale",), "dropped": ("drop_path_scale",), "both": TENSORS[4:]}
each_branch = pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with NaN before and after them in memory: a read past an edge shows."""
    buffer = torch.full((tensor.numel() + 256,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    middle = buffer[128:-128].view(tensor.shape)
    middle.copy_(tensor)
    return middle


def random_inputs(size, dtype, branch=TENSORS[4:], device="cpu", residual_dtype=None):
    """The operation's tensors by name (float parameters of dtype), and the two gradients that come in."""
    generator = torch.Generator().manual_seed(sum(size))
    B, _, C = size
    shapes = dict.fromkeys(("x", "residual", "grad_normed", "grad_residual"), size)
    shapes |= dict.fromkeys(("weight", "bias", "layer_scale"), (C,)) | {"drop_path_scale": (B,)}
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    drawn["residual"] += 2
    drawn["drop_path_scale"] = (drawn["drop_path_scale"] < 0.5) / 0.75
    dtypes = {"residual": residual_dtype or dtype, "grad_residual": residual_dtype or dtype}
    inputs = {name: poisoned(t.to(dtypes.get(name, dtype)).to(device)) for name, t in drawn.items()}
    grads = inputs.pop("grad_normed"), inputs.pop("grad_residual")
    return {name: inputs[name] for name in TENSORS if name in TENSORS[:4] or name in branch}, grads


def definition(x, residual, weight, bias, *, layer_scale=None, drop_path_scale=None, eps=1e-6):
    branch = x if layer_scale is None else layer_scale * x
    if drop_path_scale is not None:
        branch = drop_path_scale[:, None, None] * branch
    new_residual = residual + branch
    return F.layer_norm(new_residual, x.shape[-1:], weight, bias, eps), new_residual


def run(function, inputs, grads):
    """Results and gradients by name; an incoming gradient that is None means that result is not used."""
    inputs = {name: t.detach().requires_grad_(name != "drop_path_scale") for name, t in inputs.items()}
    positional = [inputs.pop(name) for name in TENSORS[:4]]
    outputs = function(*positional, **inputs)
    used = [(output, grad) for output, grad in zip(outputs, grads) if grad is not None]
    torch.autograd.backward(*zip(*used))
    inputs |= dict(zip(TENSORS, positional))
    results = {"normed": outputs[0].detach(), "new_residual": outputs[1].detach()}
    return results | {f"d_{name}": t.grad for name, t in inputs.items() if t.grad is not None}


def check_budget(ours, eager, exact):
    assert ours.keys() == exact.keys()
    for name, expected in exact.items():
        error, allowed = (ours[name].double() - expected).abs().max(), (eager[name].double() - expected).abs().max()
        floor = 1e-6 * expected.abs().max().clamp(min=1)
        assert error <= 2 * allowed + floor, f"{name}: error {error:.3g}, eager {allowed:.3g}, floor {floor:.3g}"


def check(size, dtype, branch, device="cpu", unused=None):
    inputs, grads = random_inputs(size, dtype, branch, device)
    grads = [None if i == unused else grad for i, grad in enumerate(grads)]
    exact = run(definition, {n: t.double() for n, t in inputs.items()}, [g if g is None else g.double() for g in grads])
    ours = run(add_layer_norm, inputs, grads)
    check_budget(ours, run(definition, inputs, grads), exact)
    assert all(tensor.dtype == dtype for tensor in ours.values())


@each_branch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_within_budget(size, dtype, branch):
    check(size, dtype, branch)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel_within_budget(size, dtype, monkeypatch):
    from fastdeit.kernels.add_layer_norm import triton_kernels

    monkeypatch.setattr(
        triton_kernels, "PROGRAMS", 4
    )  # few programs: each loops over several tiles, the last has fewer
    check(size, dtype, BRANCHES["both"])


@pytest.mark.interpreter
@each_branch
def test_kernel_takes_any_part_of_the_branch(branch):
    check((3, 5, 100), torch.float32, branch)


@pytest.mark.parametrize("unused", [0, 1], ids=["normed", "new_residual"])
def test_one_result_unused(unused):
    check((3, 5, 20), torch.float32, BRANCHES["both"], unused=unused)


@pytest.mark.interpreter
@pytest.mark.parametrize("unused", [0, 1], ids=["normed", "new_residual"])
def test_kernel_one_result_unused(unused):
    check((3, 5, 20), torch.float32, BRANCHES["both"], unused=unused)


def check_mixed_dtypes(half, device="cpu"):
    """A float32 residual stream and parameters beside half precision branches: the stream loses nothing."""
    inputs, grads = random_inputs((3, 5, 100), half, device=device, residual_dtype=torch.float32)
    inputs |= {name: inputs[name].float() for name in ("weight", "bias", "layer_scale", "drop_path_scale")}
    ours = run(add_layer_norm, inputs, grads)
    exact = run(definition, {n: t.double() for n, t in inputs.items()}, [grad.double() for grad in grads])
    for name, expected in exact.items():
        dtype = half if name in ("normed", "d_x") else torch.float32
        assert ours[name].dtype == dtype, name
        tolerance = 0.5 * torch.finfo(dtype).eps + 2e-6
        torch.testing.assert_close(ours[name].double(), expected, rtol=tolerance, atol=5e-6, msg=name)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_dtypes(half):
    check_mixed_dtypes(half)


@pytest.mark.interpreter
def test_kernel_mixed_dtypes():
    check_mixed_dtypes(torch.float16)


def check_strides():
    inputs, grads = random_inputs((4, 6, 20), torch.float32)
    expected = run(add_layer_norm, inputs, grads)
    across = {n: t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim == 3 else t for n, t in inputs.items()}
    across["weight"] = torch.stack((inputs["weight"], inputs["weight"]), -1)[:, 0]
    actual = run(add_layer_norm, across, [g.transpose(1, 2).contiguous().transpose(1, 2) for g in grads])
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_strides_do_not_matter():
    check_strides()


@pytest.mark.interpreter
def test_kernel_takes_any_strides():
    check_strides()


@pytest.mark.interpreter
def test_kernel_of_constant_rows():
    """No variance: eps alone stands under the root, and nothing becomes NaN."""
    inputs, grads = random_inputs((1, 4, 32), torch.float32, branch=())
    inputs["x"].zero_(), inputs["residual"].fill_(1e4)
    results = run(add_layer_norm, inputs, grads)
    assert torch.equal(results["normed"], inputs["bias"].expand(1, 4, 32))
    assert all(tensor.isfinite().all() for tensor in results.values())


def test_gradcheck():
    inputs, _ = random_inputs((2, 3, 5), torch.float64)
    tensors = [t.requires_grad_(name != "drop_path_scale") for name, t in inputs.items()]

    def operation(x, residual, weight, bias, layer_scale, drop_path_scale):
        return add_layer_norm(x, residual, weight, bias, layer_scale=layer_scale, drop_path_scale=drop_path_scale)

    assert torch.autograd.gradcheck(operation, tensors)


@each_branch
def test_opcheck(branch):
    inputs, grads = random_inputs((2, 3, 8), torch.float32, branch)
    arguments = [inputs.get(name) for name in TENSORS]
    torch.library.opcheck(_add_layer_norm, (*arguments, 1e-6))
    with torch.no_grad():
        _, *saved = _add_layer_norm(*arguments, 1e-6)
    backward = (*grads, arguments[0], *saved, arguments[2], *arguments[4:])
    torch.library.opcheck(_add_layer_norm_backward, [t if t is None else t.detach() for t in backward])


def test_compiles_without_a_graph_break():
    inputs, grads = random_inputs((2, 3, 8), torch.float32)
    compiled = run(torch.compile(add_layer_norm, fullgraph=True), inputs, grads)
    for name, expected in run(add_layer_norm, inputs, grads).items():
        torch.testing.assert_close(compiled[name], expected)


def test_empty_batch():
    inputs, grads = random_inputs((0, 3, 8), torch.float32)
    assert torch.equal(run(add_layer_norm, inputs, grads)["d_weight"], torch.zeros(8))


X, VECTOR = torch.zeros(2, 3, 4), torch.zeros(4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"x": torch.zeros(4), "residual": torch.zeros(4)}, "batch, ..., channels"),
        ({"x": X.int()}, "float32, float16 or bfloat16"),
        ({"residual": X[:1]}, "residual must have x's shape"),
        ({"weight": torch.zeros(5)}, r"weight must be \(4,\)"),
        ({"layer_scale": torch.zeros(2)}, r"layer_scale must be \(4,\)"),
        ({"drop_path_scale": torch.zeros(2, 1, 1)}, r"drop_path_scale must be \(2,\)"),
        ({"bias": torch.zeros(4, device="meta")}, "one device"),
    ],
)
def test_bad_input_is_said_in_words(arguments, message):
    good = {"x": X, "residual": X, "weight": VECTOR, "bias": VECTOR}
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**(good | arguments))


@pytest.mark.gpu
@each_branch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [*SIZES, (64, 197, 384)], ids=str)
def test_gpu_within_budget(size, dtype, branch):
    check(size, dtype, branch, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_gpu_mixed_dtypes(half):
    check_mixed_dtypes(half, device="cuda")


@pytest.mark.gpu
def test_gpu_gives_the_same_bits_a_hundred_times():
    inputs, grads = random_inputs((8, 197, 768), torch.bfloat16, device="cuda")
    first = run(add_layer_norm, inputs, grads)
    for _ in range(100):
        again = run(add_layer_norm, inputs, grads)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.gpu
def test_gpu_graph_replays_with_new_inputs():
    inputs, grads = random_inputs((8, 197, 768), torch.bfloat16, device="cuda")

    def both_ways():
        tensors = list(inputs.values())
        normed, *saved = _add_layer_norm(*tensors, 1e-6)
        return normed, *saved, *_add_layer_norm_backward(*grads, tensors[0], *saved, tensors[2], *tensors[4:])

    both_ways()  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways()
    inputs["x"].neg_(), grads[0].mul_(2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, both_ways()))
