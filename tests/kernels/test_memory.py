"""Every kernel under the memory checker of memory_watch.py, which stands in for compute-sanitizer where no GPU is.

Sizes are small and odd, so that each kind of edge is passed: one token, one row, one class, tiles that are partly
empty, several tiles. Views lie between NaN, which nobody may read. The last tests look at sizes whose offsets do not
fit into 32 bits: of those only the last program runs, in memory that is never touched.
"""

import itertools
import operator

import pytest
import torch

from fastdeit import kernels
from fastdeit.kernels import backend
from fastdeit.kernels.backend import INTERPRETED

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
from memory_watch import MemoryFault, memory_watch
from test_attention_distillation_loss import LARGE, SMALL, pairs
from test_attention_distillation_loss import make as make_maps
from triton.runtime.errors import InterpreterError

from fastdeit.kernels.add_layer_norm import triton_kernels as norm_triton
from fastdeit.kernels.attention import configs, triton_backward, triton_forward
from fastdeit.kernels.bias_gelu import triton_kernels as gelu_triton
from fastdeit.kernels.distillation_loss import triton_kernels as distillation_triton
from fastdeit.kernels.distillation_loss.reference import Arguments
from fastdeit.kernels.mix_normalize import triton_kernels as mix_triton

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero|All-NaN):RuntimeWarning"),
]
HALF, FLOAT = torch.float16, torch.float32
BEYOND_32_BITS = 2**31 + 2**24


def tensor(*shape, dtype=FLOAT, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def between_nan(*shape, dtype=FLOAT):
    """A view whose every dimension is surrounded by NaN, at an odd offset."""
    around = torch.full([n + 3 for n in shape], float("nan"), dtype=dtype)
    view = around[tuple(slice(1, n + 1) for n in shape)]
    view.copy_(tensor(*shape, dtype=dtype))
    return view.requires_grad_()


def run(leaves, function, *arguments, **options):
    """Forward, and backward to the leaves; every number that comes out must have been written."""
    with memory_watch():
        outputs = function(*arguments, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = torch.autograd.grad([output.float().sum() for output in outputs], leaves) if leaves else ()
    assert not any(x.isnan().any() for x in (*outputs, *gradients))


@pytest.mark.parametrize(
    "tokens, head_dim, dtype, arch, full_gpu",
    [
        (1, 32, HALF, 90, False),
        (17, 64, HALF, 90, False),  # one launch, one block of keys
        (130, 64, HALF, 80, True),  # one launch, three blocks; forward walks over the queries
        (130, 64, HALF, 80, False),  # two launches
        (150, 80, HALF, 90, True),  # the same with padded columns; forward with a loop and static tiles
        (150, 80, HALF, 90, False),
        (37, 32, FLOAT, 90, False),  # the masked loop; two launches
        (17, 96, FLOAT, 90, False),
    ],
)
def test_attention(tokens, head_dim, dtype, arch, full_gpu, monkeypatch):
    monkeypatch.setattr(configs, "FULL_GPU", 1 if full_gpu else 264)
    for module in (triton_forward, triton_backward):
        monkeypatch.setattr(module, "architecture", lambda x: arch)
    qkv = between_nan(2, tokens, 3, 2, head_dim, dtype=dtype)
    run([qkv], kernels.attention_qkvpacked, qkv, return_lse=True)
    run([qkv], lambda x: kernels.attention(*x.unbind(2)), qkv)
    few = between_nan(2, 3, 2, head_dim, dtype=dtype)
    _, k, v = qkv.unbind(2)
    run([few, qkv], lambda *x: kernels.attention(*x), few, k, v)
    run([few, qkv], lambda *x: kernels.attention(*x), k, few, few)


@pytest.mark.parametrize("case, dtype", [*((c, FLOAT) for c in SMALL), *((c, HALF) for c in LARGE)], ids=str)
def test_attention_distillation_loss(case, dtype):
    student, teacher = make_maps(case, dtype)
    student.requires_grad_()
    run([student], lambda: kernels.attention_distillation_loss(*pairs(case, student, teacher), **case.options))


TARGETS = {
    "none": lambda B, C: None,
    "labels": lambda B, C: torch.tensor([0, -100, C - 1])[:B],
    "dense": lambda B, C: between_nan(B, C).detach().softmax(1),
}
TEACHERS = {
    "labels": lambda B, C: torch.full((B,), C - 1),
    "logits": lambda B, C: between_nan(B, C, dtype=HALF).detach(),
    "stored": lambda B, C: tuple(reversed(tensor(B, C).softmax(1).topk(min(C, 3)))),
}
KINDS = [("none", "none"), ("hard", "labels"), ("hard", "logits"), ("soft", "logits"), ("soft", "stored")]


@pytest.mark.parametrize("kind, teacher", KINDS)
@pytest.mark.parametrize("classes", [1, 37])
def test_distillation_loss(classes, kind, teacher, monkeypatch):
    for direction in ("MAX_BLOCK", "BACKWARD_BLOCK"):
        monkeypatch.setattr(distillation_triton, direction, 16)  # three blocks of 37 classes
    B = 3
    for target, mixed, two_heads in itertools.product(TARGETS, (False, True), (False, True)):
        if mixed and target != "labels":
            continue
        heads = [between_nan(B, classes, dtype=HALF if two_heads else FLOAT) for _ in range(1 + two_heads)]
        mix = (torch.tensor([0, 0, classes - 1]), torch.tensor([0.0, 1.0, 0.3])) if mixed else None
        arguments = (*heads, *(() if two_heads else (None,)), TARGETS[target](B, classes))
        answer = TEACHERS[teacher](B, classes) if kind != "none" else None
        options = {"kind": kind, "smoothing": 0.1 * two_heads, "mix": mix}
        used = [head for head, term in zip(heads, (True, kind != "none")) if term]
        run(used, kernels.distillation_loss, *arguments, answer, **options)
        with torch.no_grad():
            run([], kernels.distillation_loss, *arguments, answer, **options, return_terms=True)


@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (3, 7, 33)], ids=str)
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=str)
def test_add_layer_norm(shape, used):
    for plain, dtype in itertools.product((False, True), (FLOAT, HALF)):
        x, residual = between_nan(*shape, dtype=dtype), between_nan(*shape)
        weight, bias, gamma = (between_nan(shape[-1]) for _ in range(3))
        factors = {} if plain else {"layer_scale": gamma, "drop_path_scale": torch.rand(shape[0])}
        leaves = [x, residual, *([weight, bias] if 0 in used else []), *([] if plain else [gamma])]
        run(leaves, lambda *a, **k: operator.itemgetter(*used)(kernels.add_layer_norm(*a, **k)),
            x, residual, weight, bias, **factors)  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (3, 7, 300), (37, 1)], ids=str)
def test_bias_gelu(shape, monkeypatch):
    monkeypatch.setattr(gelu_triton, "PROGRAMS", 2)  # which then take several blocks of rows
    for dtype in (FLOAT, HALF):
        x, bias = between_nan(*shape, dtype=dtype), between_nan(shape[-1])
        run([x, bias], kernels.bias_gelu, x, bias)


@pytest.mark.parametrize("rows, width, hidden", [(1, 64, 64), (37, 64, 192), (70, 192, 128)])
@pytest.mark.parametrize("arch", [86, 90])
def test_mlp(rows, width, hidden, arch, monkeypatch):
    monkeypatch.setattr(backend, "CPU_ARCHITECTURE", arch)
    for dtype in (FLOAT, HALF):
        x, weight1, weight2 = (
            between_nan(*shape, dtype=dtype) for shape in ((rows, width), (hidden, width), (width, hidden))
        )
        bias1, bias2 = between_nan(hidden), between_nan(width)
        leaves = [x, weight1, bias1, weight2, bias2]
        run(leaves, kernels.mlp, *leaves)


PIXELS = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
DRAWS = [(), ("partner", "lam"), ("partner", "lam", "box"), ("erase_box", "erase_seed"), "all"]


def draws_of(B, H, W, given):
    boxes = torch.tensor([[0, 0, 0, 0], [-3, 1, H + 2, W], [0, 0, H, W], [0, 0, 1, 1]], dtype=torch.int32)[:B]
    every = {
        "partner": torch.arange(B).flip(0), "lam": torch.tensor([0.3, 1.0, 0.0, 0.7])[:B], "box": boxes,
        "erase_box": boxes.flip(0), "erase_seed": torch.arange(B) - 2**62,
    }  # fmt: skip
    return every if given == "all" else {name: every[name] for name in given}


@pytest.mark.parametrize("given", DRAWS, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (4, 17, 7), (4, 40, 32)], ids=str)
def test_mix_normalize(size, given):
    images = torch.randint(0, 255, (*size, 3), dtype=torch.uint8)
    for channels_last in (True, False):
        options = {"channels_last": channels_last, **draws_of(*size, given)}
        run([], kernels.mix_normalize, images, *PIXELS, **options)


def test_tiles_beyond_the_second_axis_of_the_grid(monkeypatch):
    images, draws = torch.randint(0, 255, (2, 45, 32, 3), dtype=torch.uint8), draws_of(2, 45, 32, "all")
    expected = kernels.mix_normalize(images, *PIXELS, **draws)
    monkeypatch.setattr(mix_triton, "MAX_GRID_Y", 3)  # 5 tiles: 2 layers of 3
    assert torch.equal(kernels.mix_normalize(images, *PIXELS, **draws), expected)
    run([], kernels.mix_normalize, images, *PIXELS, **draws)


def test_wrong_indices_on_a_gpu_reach_no_memory_of_others(monkeypatch):
    """Where they are not refused because looking would stop the stream."""
    for direction in ("MAX_BLOCK", "BACKWARD_BLOCK"):
        monkeypatch.setattr(distillation_triton, direction, 16)
    wild, weights = torch.tensor([2**40, -(2**40), 37]), torch.tensor([0.5, 0.0, 1.0])
    logits, stored = tensor(3, 37), torch.stack((wild, wild + 5), 1)
    with memory_watch():
        for teacher in ((wild, None, "hard"), (stored, torch.rand(3, 2), "soft")):
            arguments = Arguments(logits, logits, wild, wild.flip(0), weights, *teacher, 0.5, 1.0, 0.1, False)
            _, _, statistics = distillation_triton.launch_forward(arguments)
            distillation_triton.launch_backward(torch.ones(3), statistics, arguments)
        images, boxes = torch.zeros(3, 8, 8, 3, dtype=torch.uint8), torch.tensor([-(2**31), 5, 2**30, 2**31 - 2])
        boxes = boxes.int().expand(3, 4)
        mix_triton.mix_normalize_triton(images, *PIXELS, wild, weights, boxes, boxes, wild, FLOAT, True)


# The checker itself.


@triton.jit
def shift_kernel(x_ptr, y_ptr, n, shift, step, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """y[i + shift] = x[i], in blocks that lie `step` apart, and once more what came of it."""
    index = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(y_ptr + index + shift, tl.load(x_ptr + index, mask=index < n), mask=index < n)
    if BARRIER is not None:
        if BARRIER:
            tl.debug_barrier()
        tl.store(y_ptr + index + shift, 2 * tl.load(y_ptr + index + shift, mask=index < n), mask=index < n)


def shift(x, y, n, *, by=0, step=8, barrier=None, programs=2):
    with memory_watch():
        shift_kernel[(programs,)](x, y, n, by, step, BARRIER=barrier, BLOCK=8)


def test_the_checker_lets_good_programs_pass():
    x = tensor(13)
    y = torch.empty(13)
    shift(x, y, 13)
    assert torch.equal(x, y)
    shift(x, y, 13, barrier=True)  # updates y in place, behind a barrier
    assert torch.equal(2 * x, y)


@pytest.mark.parametrize(
    "x, y, options, message",
    [
        (13, 13, {"n": 14}, r"reads a \(13,\) .* outside, from 52 to 52 bytes"),
        (14, 13, {"n": 14}, r"writes a \(13,\) .* outside, from 52 to 52 bytes"),
        (13, 13, {"n": 13, "by": -1}, r"writes a \(13,\) .* outside, from -4 to -4 bytes"),
        (13, 13, {"n": 13, "step": 7}, "writes .* where another program has written"),
        (24, None, {"n": 16, "by": 8}, "reads .* where another program has written"),
        (13, 13, {"n": 13, "barrier": False}, "reads .* where it has written, with no barrier"),
        (None, 13, {"n": 13}, "reads memory that nobody wrote"),
        (13, 13, {"n": 0, "programs": 0}, "a grid of"),
    ],
)
def test_the_checker_catches(x, y, options, message):
    """Sizes of x and y; None for x is fresh memory, None for y is x."""
    with memory_watch():
        source = torch.empty(13) if x is None else tensor(x)
    with pytest.raises((MemoryFault, InterpreterError), match=message):
        shift(source, source if y is None else torch.zeros(y), **options)


def test_the_checker_knows_the_gaps_of_a_view():
    x = tensor(4, 8)
    with pytest.raises(InterpreterError, match=r"reads a \(4, 6\) .* outside"):
        shift(x[:, 1:7], torch.zeros(4, 8), 16)
    shift(x[1:3], torch.zeros(4, 8), 16)


@triton.jit
def count_kernel(counts_ptr, index):
    tl.atomic_add(counts_ptr + index + tl.arange(0, 4), 1)


def test_the_checker_takes_atomics_of_several_programs_and_knows_their_bounds():
    counts = torch.zeros(5, dtype=torch.int32)
    with memory_watch():
        count_kernel[(3,)](counts, 1)
    assert counts.tolist() == [0, 3, 3, 3, 3]
    with pytest.raises(InterpreterError, match=r"updates a \(5,\) .* outside, from 20 to 20"), memory_watch():
        count_kernel[(3,)](counts, 2)


# Offsets beyond 32 bits.


def run_last(function):
    try:
        with memory_watch(last_program_only=True):
            function()
    except RuntimeError as error:
        if "alloc" in str(error):
            pytest.skip(f"this machine promises too little memory: {error}")
        raise


@pytest.mark.parametrize("full_gpu", [False, True])
@pytest.mark.parametrize("arch, tokens, heads", [(90, 197, 12), (80, 65, 1)])
def test_large_attention(arch, tokens, heads, full_gpu, monkeypatch):
    """Inputs, outputs, gradients or scratch of more than 2**31 elements, strides beyond 2**31."""
    monkeypatch.setattr(configs, "FULL_GPU", 1 if full_gpu else 2**40)
    for module in (triton_forward, triton_backward):
        monkeypatch.setattr(module, "architecture", lambda x: arch)

    def packed():
        batch = BEYOND_32_BITS // (tokens * 3 * heads * 64) + 1
        qkv = torch.empty((batch, tokens, 3, heads, 64), dtype=HALF)
        out, lse = torch.ops.fastdeit.attention_qkvpacked(qkv, 0.1)
        torch.ops.fastdeit.attention_qkvpacked_backward(out, qkv, out, lse, 0.1, lse)

    def sparse():
        batch = BEYOND_32_BITS // (tokens * heads * 64) + 1
        q = torch.empty((1, tokens, heads, 64), dtype=HALF).expand(batch, -1, -1, -1)
        k = torch.empty(BEYOND_32_BITS, dtype=HALF).as_strided((2, *q.shape[1:]), (2**31 + 64, heads * 64, 64, 1))
        out, lse = torch.ops.fastdeit.attention(q[:2], k, k, 0.1)
        torch.ops.fastdeit.attention_backward(out, q[:2], k, k, out, lse, 0.1, None)
        if heads == 1:
            out, lse = torch.ops.fastdeit.attention(q, q, q, 0.1)
            torch.ops.fastdeit.attention_backward(out, q, q, q, out, lse, 0.1, lse)

    run_last(packed)
    run_last(sparse)


@pytest.mark.parametrize("objective", ["kl", "mse"])
def test_large_attention_distillation_loss(objective):
    def function():
        batch = BEYOND_32_BITS // (50 * 12 * 64) + 1
        q, k = torch.empty((batch, 50, 2, 12, 64), dtype=HALF).unbind(2)
        loss, *saved = torch.ops.fastdeit.attention_distillation_loss(q, k, k, q, 0.1, 0.1, objective)
        torch.ops.fastdeit.attention_distillation_loss_backward(loss, q, k, k, q, *saved, 0.1, 0.1, objective)

    run_last(function)


@pytest.mark.parametrize("kind, stored", [("hard", False), ("soft", False), ("soft", True)])
def test_large_distillation_loss(kind, stored):
    def function():
        batch, classes = BEYOND_32_BITS // 32768, 32768
        logits, labels = torch.empty((batch, classes), dtype=HALF), torch.zeros(batch, dtype=torch.int64)
        teacher = (torch.zeros((batch, 1), dtype=torch.int64), torch.ones(batch, 1)) if stored else (logits, None)
        arguments = logits, logits, labels, None, None, *teacher, kind, 0.5, 1.0, 0.1, False
        losses, _, statistics = torch.ops.fastdeit.distillation_loss(*arguments)
        torch.ops.fastdeit.distillation_loss_backward(losses, statistics, *arguments)

    run_last(function)


def test_large_add_layer_norm(monkeypatch):
    monkeypatch.setattr(norm_triton, "PROGRAMS", 2**11)  # lets the last program be short

    def function():
        batch = BEYOND_32_BITS // 8192
        x, vector, factors = torch.empty((batch, 1, 8192), dtype=HALF), torch.ones(8192), torch.ones(batch)
        _, residual, mean, rstd = torch.ops.fastdeit.add_layer_norm(x, x, vector, vector, vector, factors, 1e-6)
        torch.ops.fastdeit.add_layer_norm_backward(x, x, x, residual, mean, rstd, vector, vector, factors)

    run_last(function)


def test_large_bias_gelu(monkeypatch):
    monkeypatch.setattr(gelu_triton, "PROGRAMS", 2**14)

    def function():
        x, bias = torch.empty((BEYOND_32_BITS // 32768, 32768), dtype=HALF), torch.ones(32768)
        torch.ops.fastdeit.bias_gelu_backward(torch.ops.fastdeit.bias_gelu(x, bias), x, bias)

    run_last(function)


def test_large_mlp():
    def function():
        x, bias = torch.empty((BEYOND_32_BITS // 64, 64), dtype=HALF), torch.ones(128)
        weights = torch.ones((128, 64), dtype=HALF), torch.ones((64, 128), dtype=HALF)
        y = torch.ops.fastdeit.mlp(x, weights[0], bias, weights[1], bias[:64])
        torch.ops.fastdeit.mlp_backward(y, x, weights[0], bias, weights[1])

    run_last(function)


@pytest.mark.parametrize("size", [(BEYOND_32_BITS // (3 * 224 * 224) + 1, 224, 224), (4, 13000, 14000)], ids=str)
def test_large_mix_normalize(size):
    def function():
        draws = {name: draw.expand(size[0], *draw.shape[1:]) for name, draw in draws_of(1, *size[1:], "all").items()}
        images = torch.empty((*size, 3), dtype=torch.uint8)
        kernels.mix_normalize(images, *PIXELS, dtype=HALF, channels_last=size[1] > 224, **draws)

    run_last(function)
