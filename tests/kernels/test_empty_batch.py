"""No samples, or no heads: nothing comes back of the right shapes, sums over samples are 0, and means are refused."""

import contextlib

import pytest
import torch

from fastdeit import kernels

DEVICES = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("interpreter", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)],
)


@contextlib.contextmanager
def on(device):
    """The default device; in the interpreter the memory checker, to which a launch of no programs is a fault."""
    if device == "interpreter":
        from memory_watch import memory_watch

        with memory_watch():
            yield
    else:
        with torch.device(device):
            yield


def leaf(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype).requires_grad_()


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 64), (2, 5, 3, 0, 64)], ids=str)
def test_attention(shape, dtype, device):
    with on(device):
        qkv = leaf(*shape, dtype=dtype)
        out, lse = kernels.attention_qkvpacked(qkv, return_lse=True)
        (grad,) = torch.autograd.grad(out.sum() + lse.sum(), qkv)
        assert out.shape == qkv[:, :, 0].shape and lse.shape == (shape[0], shape[3], 5) and grad.shape == qkv.shape
        (grad,) = torch.autograd.grad(kernels.attention(*qkv.unbind(2)).sum(), qkv)
        assert grad.shape == qkv.shape


@DEVICES
@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (0, 7)], ids=str)
def test_pointwise(shape, device):
    with on(device):
        x, weight, bias = leaf(*shape), leaf(7), leaf(7)
        gelu, (normed, residual) = kernels.bias_gelu(x, bias), kernels.add_layer_norm(x, x, weight, bias)
        assert gelu.shape == normed.shape == residual.shape == shape
        for sums in torch.autograd.grad(gelu.sum() + normed.sum() + residual.sum(), (weight, bias)):
            assert torch.equal(sums, torch.zeros(7))


@DEVICES
@pytest.mark.parametrize("shape", [(0, 5, 64), (2, 0, 64), (0, 64)], ids=str)
def test_mlp(shape, device):
    with on(device):
        x, *parameters = (leaf(*s, dtype=torch.float16) for s in (shape, (128, 64), (128,), (64, 128), (64,)))
        y = kernels.mlp(x, *parameters)
        assert y.shape == shape
        for sums, parameter in zip(torch.autograd.grad(y.sum(), parameters), parameters):
            assert torch.equal(sums, torch.zeros_like(parameter))


@DEVICES
def test_mix_normalize(device):
    with on(device):
        images, none = torch.ones(0, 8, 6, 3, dtype=torch.uint8), torch.ones(0, dtype=torch.int64)
        mixed = kernels.mix_normalize(images, (0.5,) * 3, (0.5,) * 3, partner=none, lam=none.float())
        assert mixed.shape == (0, 3, 8, 6)


@DEVICES
def test_a_mean_over_no_samples_is_refused(device):
    with on(device):
        logits, labels, maps = leaf(0, 7), torch.ones(0, dtype=torch.int64), leaf(0, 5, 2, 16)
        with pytest.raises(ValueError, match=r"neither of them 0, not \(0, 7\)"):
            kernels.distillation_loss(logits, None, labels, None, kind="none")
        with pytest.raises(ValueError, match=r"none 0, not \(0, 5, 2, 16\)"):
            kernels.attention_distillation_loss(maps, maps, maps, maps)
