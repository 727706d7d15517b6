"""The Triton attention kernels against float64: in the interpreter here, compiled on a GPU.

Sizes: 1 (a softmax of one), 5, 16 and 17 (around the smallest tile), 63 and 65 (around a matrix instruction's rows),
197 and 198 (DeiT), 257 (ViT-H; from here on few heads take two backward launches), 577 (384 pixels). head_dim 72, 80
and 96 are two tiles side by side (64 + 16 and 64 + 32 columns), 40 and 48 too.
"""

import pytest
import torch
from attention_oracle import check, definition

from fastdeit.kernels import attention, attention_qkvpacked
from fastdeit.kernels.attention import configs, triton_backward, triton_forward
from fastdeit.kernels.backend import column_parts

SHAPES = [  # batch, tokens, heads, head_dim
    (3, 1, 1, 64),
    (1, 5, 3, 32),
    (1, 16, 1, 128),
    (3, 17, 1, 80),
    (1, 63, 1, 64),
    (1, 65, 1, 96),
    (1, 197, 3, 64),
    (3, 198, 1, 64),
    (1, 257, 1, 80),
    (1, 100, 1, 72),
    (1, 577, 1, 64),
]
CROSS = [  # queries, keys, head_dim
    (1, 197, 64),  # attention pooling, a class token
    (2, 198, 32),
    (70, 3, 72),
    (33, 300, 64),  # two backward launches, fewer queries than one of their blocks
    (300, 17, 16),
]
interpreter = pytest.param("cpu", marks=pytest.mark.interpreter)
gpu = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = pytest.mark.parametrize("device", [interpreter, gpu])
DEVICES_AND_DTYPES = pytest.mark.parametrize(
    "device, dtype",
    [
        pytest.param(device, dtype, marks=getattr(pytest.mark, mark), id=f"{device}-{str(dtype)[6:]}")
        for device, mark, dtypes in [
            ("cpu", "interpreter", [torch.float32, torch.float16]),
            ("cuda", "gpu", [torch.float32, torch.float16, torch.bfloat16]),
        ]
        for dtype in dtypes
    ],
)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty fills with NaN under deterministic algorithms, so what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(*shape, device, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def poisoned(batch, tokens, heads, head_dim, device, dtype):
    """A packed qkv in the middle of a tensor of NaN."""
    around = torch.full((batch + 1, tokens + 3, 3, heads + 1, head_dim + 16), float("nan"), device=device, dtype=dtype)
    qkv = around[:batch, 1 : tokens + 1, :, :heads, 8 : head_dim + 8]
    qkv.copy_(make(*qkv.shape, device=device, dtype=dtype))
    return qkv


def packed(q, k, v, **options):
    return attention_qkvpacked(torch.stack((q, k, v), 2), return_lse=True, **options)


@DEVICES_AND_DTYPES
@pytest.mark.parametrize("batch, tokens, heads, head_dim", SHAPES)
def test_matches_float64(batch, tokens, heads, head_dim, device, dtype):
    q, k, v = poisoned(batch, tokens, heads, head_dim, device, dtype).unbind(2)
    check(lambda *x: attention(*x, return_lse=True), q, k, v, head_dim**-0.5)
    check(packed, q, k, v, head_dim**-0.5, through_lse=False)


@DEVICES_AND_DTYPES
@pytest.mark.parametrize("queries, keys, head_dim", CROSS)
@pytest.mark.parametrize("full_gpu", [False, True])
def test_other_keys_than_queries(queries, keys, head_dim, full_gpu, device, dtype, monkeypatch):
    monkeypatch.setattr(configs, "FULL_GPU", 1 if full_gpu else 264)
    q, _, _ = poisoned(2, queries, 1, head_dim, device, dtype).unbind(2)
    _, k, v = poisoned(2, keys, 1, head_dim, device, dtype).unbind(2)
    check(lambda *x: attention(*x, return_lse=True), q, k, v, head_dim**-0.5)


@DEVICES
@pytest.mark.parametrize("head_dim", [16, 24, 40, 48, 56, 72, 88, 104, 112, 120])
def test_every_head_dim(head_dim, device):
    q, k, v = poisoned(1, 37, 2, head_dim, device, torch.float16).unbind(2)
    check(lambda *x: attention(*x, return_lse=True), q, k, v, head_dim**-0.5)
    check(packed, q, k, v, head_dim**-0.5, through_lse=False)


@DEVICES
def test_more_tokens_than_a_picture_has(device):
    """Their number is not limited: the blocks of a loop become more."""
    q, k, v = poisoned(1, 4133, 1, 32, device, torch.float16).unbind(2)
    check(lambda *x: attention(*x, return_lse=True), q[:, :70], k, v, 32**-0.5)


@DEVICES
def test_reads_any_strides_in_place(device):
    q = make(2, 3, 33, 64, device=device, dtype=torch.float32).transpose(1, 2)  # heads before tokens
    k = make(33, 2, 3, 64, device=device, dtype=torch.float32, seed=1).transpose(0, 1)  # tokens before batch
    v = make(2, 33, 3, 128, device=device, dtype=torch.float32, seed=2)[..., ::2]  # head_dim not contiguous: copied
    check(lambda *x: attention(*x, return_lse=True), q, k, v, 0.125)


@DEVICES
def test_poison_outside_the_tensor_is_never_read(device):
    qkv = poisoned(2, 37, 2, 64, device, torch.float32).requires_grad_()
    out, lse = attention_qkvpacked(qkv, return_lse=True)
    (grad,) = torch.autograd.grad(out.sum() + lse.sum(), qkv)
    assert out.isfinite().all() and lse.isfinite().all() and grad.isfinite().all()


@DEVICES
@pytest.mark.parametrize("tokens, full_gpu", [(65, False), (65, True), (300, False)])
def test_huge_logits(tokens, full_gpu, device, monkeypatch):
    """Logits from -1e4 to 1e4: exp overflows unless the maximum is subtracted, also for the keys past the end."""
    monkeypatch.setattr(configs, "FULL_GPU", 1 if full_gpu else 264)
    q, k, v = (make(1, tokens, 1, 64, device=device, dtype=torch.float16, seed=i) for i in range(3))
    largest = definition(q.double(), k.double(), v.double(), 1.0)[1].abs().max().item()
    scale = 1e4 / largest
    for sign in (1, -1):
        check(lambda *x: attention(*x, scale=scale, return_lse=True), q, sign * k, v, scale)
        check(lambda *x: attention(*x, scale=scale, return_lse=True), q.abs(), sign * k.abs(), v, scale)


@DEVICES
def test_equal_rows_average_the_values(device):
    q = make(1, 21, 2, 64, device=device, dtype=torch.float32)
    k = q[:, :1].expand(-1, 21, -1, -1)
    v = make(1, 21, 2, 64, device=device, dtype=torch.float32, seed=1)
    out = attention(q, k, v)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out))


@DEVICES
@pytest.mark.parametrize("arch, tokens, head_dim", [(90, 198, 64), (80, 198, 64), (90, 300, 64), (100, 100, 80)])
def test_full_gpu_in_small(arch, tokens, head_dim, device, monkeypatch):
    """What many heads take at ViT sizes, with few: one program walks over all queries forward; one launch backward,
    which sums dQ over blocks of keys where these do not fit at once."""
    monkeypatch.setattr(configs, "FULL_GPU", 1)
    for module in (triton_forward, triton_backward):
        monkeypatch.setattr(module, "architecture", lambda x: arch)
    half = torch.float16
    assert configs.backward_config(arch, tokens, sum(column_parts(head_dim)), half, 1).one is not None
    q, k, v = poisoned(1, tokens, 1, head_dim, device, half).unbind(2)
    check(lambda *x: attention(*x, return_lse=True), q, k, v, head_dim**-0.5)
    check(packed, q, k, v, head_dim**-0.5, through_lse=False)


@DEVICES
def test_two_backward_launches_on_other_gpus(device, monkeypatch):
    """Ampere's configurations, which hold fewer keys in one program."""
    for module in (triton_forward, triton_backward):
        monkeypatch.setattr(module, "architecture", lambda x: 80)
    q, k, v = (make(1, 198, 1, 64, device=device, dtype=torch.float16, seed=i) for i in range(3))
    check(lambda *x: attention(*x, return_lse=True), q, k, v, 0.125)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "batch, tokens, heads, head_dim", [(64, 198, 6, 64), (16, 578, 12, 64), (2, 578, 6, 64), (16, 257, 16, 80)]
)
def test_full_gpu(batch, tokens, heads, head_dim):
    q, k, v = make(batch, tokens, 3, heads, head_dim, device="cuda", dtype=torch.bfloat16).unbind(2)
    check(lambda *x: attention(*x, return_lse=True), q, k, v, head_dim**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [198, 578])
def test_deterministic(tokens):
    qkv = make(32, tokens, 3, 6, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    grad_out = make(32, tokens, 6, 64, device="cuda", dtype=torch.bfloat16, seed=1)

    def run():
        out, lse = attention_qkvpacked(qkv, return_lse=True)
        return out.detach(), lse.detach(), *torch.autograd.grad(out, qkv, grad_out)

    first = run()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_launch_of_two_key_blocks_many_times(dtype):
    """Triton 3.6 has wgmma read there what cp.async wrote, with no fence.proxy.async between (benchmarks/LOG.md)."""
    q = make(64, 33, 8, 64, device="cuda", dtype=dtype)
    k, v = (make(64, 70, 8, 64, device="cuda", dtype=dtype, seed=seed) for seed in (1, 2))
    check(lambda *x: attention(*x, return_lse=True), q, k, v, 0.125)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run():
        return torch.autograd.grad(attention(*leaves), leaves, torch.ones_like(q))

    first = run()
    for _ in range(300):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [198, 578])
def test_cuda_graph(tokens):
    qkv = make(4, tokens, 3, 6, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    grad_out = make(4, tokens, 6, 64, device="cuda", dtype=torch.bfloat16, seed=1)

    def run():
        out = attention_qkvpacked(qkv)
        return out.detach(), *torch.autograd.grad(out, qkv, grad_out)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (2, 3):
        with torch.no_grad():
            qkv.copy_(make(*qkv.shape, device="cuda", dtype=torch.bfloat16, seed=seed))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run()))


@pytest.mark.gpu
def test_compiled_on_the_gpu():
    qkv = make(4, 198, 3, 6, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()

    def loss(qkv):
        return attention_qkvpacked(qkv).float().square().mean()

    (grad,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(qkv), qkv)
    (expected,) = torch.autograd.grad(loss(qkv), qkv)
    torch.testing.assert_close(grad, expected, rtol=2e-2, atol=1e-6)
