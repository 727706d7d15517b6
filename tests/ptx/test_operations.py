"""Every operation's compiled code, forward and backward, executed by the emulator, against float64.

The checks and their error budgets are those of tests/kernels. What is not marked soak takes every operation, dtype and
architecture once, at small odd sizes. `make test-ptx` adds the size of a real model for each, and other sizes and
options in one of the dtypes on each architecture.
"""

import pytest
import torch

from fastdeit import kernels
from fastdeit.kernels.attention import configs
from tests.kernels import attention_oracle
from tests.kernels import test_add_layer_norm as add_layer_norm
from tests.kernels import test_attention_bias as attention_bias
from tests.kernels import test_attention_distillation_loss as attention_distillation_loss
from tests.kernels import test_attention_varlen as attention_varlen
from tests.kernels import test_bias_gelu as bias_gelu
from tests.kernels import test_distillation_loss as distillation_loss
from tests.kernels import test_mix_normalize as mix_normalize
from tests.kernels import test_mlp as mlp

from .emulator import emulated

LOSS, MAPS = distillation_loss.Case, attention_distillation_loss.Case
BOTH = add_layer_norm.BRANCHES["both"]
HALF = (torch.bfloat16, torch.float16)
ARCHITECTURES = (80, 90, 100)
SWIN = [(4, 49, 49, 2, 32, (2, 1))]


def everywhere(cases, real=(), more=()):
    """Parametrizes arch, dtype and case. real and more, marked soak, are the size of a real model, and what else there
    is: in one dtype on each architecture, the other for every second case."""
    soak = pytest.mark.soak
    chosen = [
        (arch, dtype, case, marks)
        for marks, group in (((), cases), (soak, real))
        for arch in ARCHITECTURES
        for dtype in HALF
        for case in group
    ]
    chosen += [
        (arch, HALF[(i + n) % 2], case, soak) for n, arch in enumerate(ARCHITECTURES) for i, case in enumerate(more)
    ]
    return pytest.mark.parametrize(
        "arch, dtype, case",
        [
            pytest.param(arch, dtype, case, id=f"sm_{arch}-{str(dtype)[6:]}-{case}".replace(" ", ""), marks=marks)
            for arch, dtype, case, marks in chosen
        ],
    )


def packed(q, k, v):
    return kernels.attention_qkvpacked(torch.stack((q, k, v), 2), return_lse=True)


def separate(q, k, v):
    return kernels.attention(q, k, v, return_lse=True)


def queries_keys_values(queries, keys, head_dim, dtype):
    """Two heads between NaN, in memory and in the elements that are read in one piece with theirs."""
    generator = torch.Generator().manual_seed(queries + keys)
    rows = max(queries, keys)
    around = torch.full((1, rows + 2, 3, 2, head_dim + 16), float("nan"), dtype=dtype)
    view = around[:, 1:-1, :, :1, 8:-8]
    view.copy_(torch.randn(view.shape, generator=generator))
    return view[:, :queries, 0], view[:, :keys, 1], view[:, :keys, 2]


@pytest.mark.parametrize("full_gpu", [False, True], ids=["few heads", "full GPU"])
@everywhere(
    [(33, 70, 64), (18, 40, 72)],
    real=[(198, 198, 64)],
    more=[(257, 257, 80), (130, 130, 96), (66, 66, 128), (300, 300, 64), (1, 197, 72), (197, 3, 16)],
)
def test_attention(arch, dtype, case, full_gpu, monkeypatch):
    monkeypatch.setattr(configs, "FULL_GPU", 1 if full_gpu else 264)
    queries, keys, head_dim = case
    q, k, v = queries_keys_values(queries, keys, head_dim, dtype)
    if queries == 198 and not full_gpu:
        pytest.skip("long; a training step has many heads")
    with emulated(arch) as launches:
        attention_oracle.check(separate, q, k, v, head_dim**-0.5)
        if queries == keys:
            attention_oracle.check(packed, q, k, v, head_dim**-0.5, through_lse=False)
    kinds = {launch.kernel.split("_")[0] for launch in launches}
    assert "backward" in kinds and kinds <= {"resident", "streaming", "backward"}


@everywhere([(2, 17, 37, 1, 32, (1,))], real=SWIN, more=[s for s in attention_bias.SHAPES if s not in SWIN])
def test_attention_with_bias(arch, dtype, case):
    with emulated(arch) as launches:
        attention_bias.check(case, dtype)
    assert [launch.kernel for launch in launches][-1] == "bias_gradient_kernel"


@everywhere(
    [((17, 0, 5), 1, 32), ((3, 2, 20), 1, 40, (18, 0, 5))], real=[((197, 50), 1, 64)], more=attention_varlen.CASES
)
def test_attention_varlen(arch, dtype, case):
    with emulated(arch) as launches:
        attention_varlen.check(case, dtype)
    assert [launch.kernel.split("_")[1] for launch in launches] == ["forward", "backward", "backward"]


@everywhere(
    [LOSS(1001, "soft", "mix"), LOSS(1001, "stored", "labels", heads=1)],
    real=[LOSS(1000, "hard", "mix")],
    more=[LOSS(5001, "soft", "dense", batch=2), LOSS(10, "soft", "mix", scale=1e4)],
)
def test_distillation_loss(arch, dtype, case):
    with emulated(arch) as launches:
        distillation_loss.check(case, dtype)
    assert launches


@everywhere(
    [MAPS(35, 34, head_dim=32, teacher_dim=64)],
    real=[MAPS(198, 197, head_dim=64, teacher_dim=64)],
    more=[MAPS(66, 65, head_dim=64, teacher_dim=64), MAPS(65, options=attention_distillation_loss.MSE)],
)
def test_attention_distillation_loss(arch, dtype, case):
    with emulated(arch) as launches:
        attention_distillation_loss.check(case, dtype)
    assert len(launches) > 1


@everywhere([(3, 5, 100)], real=[(2, 7, 768)], more=[(2, 33, 192), (1, 3, 1280)])
def test_add_layer_norm(arch, dtype, case, monkeypatch):
    from fastdeit.kernels.add_layer_norm import triton_kernels

    monkeypatch.setattr(triton_kernels, "PROGRAMS", 4)  # few programs: each loops over several tiles
    with emulated(arch) as launches:
        add_layer_norm.check(case, dtype, BOTH)
    assert [launch.kernel for launch in launches] == ["add_layer_norm_forward_kernel", "add_layer_norm_backward_kernel"]


@everywhere([(3, 5, 100)], real=[(2, 65, 192)], more=[(1, 17, 1280)])
def test_bias_gelu(arch, dtype, case, monkeypatch):
    from fastdeit.kernels.bias_gelu import triton_kernels

    monkeypatch.setattr(triton_kernels, "PROGRAMS", 8)
    with emulated(arch) as launches:
        bias_gelu.check(case, dtype)
    assert [launch.kernel for launch in launches] == ["bias_gelu_forward_kernel", "bias_gelu_backward_kernel"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bias_gelu_of_the_worst_approximations(arch):
    """The hardware's exponential, reciprocal and division may be as wrong as PTX says."""
    with emulated(arch, worst=True):
        bias_gelu.test_kernel_over_the_whole_range()
        bias_gelu.test_kernel_passes_nan_and_infinity_on()


@everywhere([((2, 37, 64), 128)], real=[((2, 65, 192), 768)], more=[((70, 128), 512)])
def test_mlp(arch, dtype, case):
    with emulated(arch) as launches:
        mlp.check(case, dtype)
    assert [launch.kernel for launch in launches] == ["mlp_forward_kernel", "mlp_backward_kernel"]


@pytest.mark.parametrize("channels_last", [True, False])
@everywhere([(4, 9, 13)], real=[(5, 64, 32)])
def test_mix_normalize(arch, dtype, case, channels_last):
    with emulated(arch) as launches:
        mix_normalize.check_against_the_definition(case, dtype, channels_last)
    assert launches


@pytest.mark.soak
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_attention_in_float32(arch, precision, monkeypatch):
    """In TF32 the numbers keep eleven bits, as float16's."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
    q, k, v = queries_keys_values(70, 70, 64, torch.float32)
    with emulated(arch) as launches:
        outs = separate(q, k, v)
    assert launches
    exact = attention_oracle.definition(q.double(), k.double(), v.double(), 0.125)
    for ours, theirs in zip(outs, exact):
        assert attention_oracle.error(ours, theirs) < (5e-3 if precision == "tf32" else 5e-6)
