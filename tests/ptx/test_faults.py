"""The emulator notices what would be a race, or wrong, on a GPU: our kernels with an instruction taken out."""

import re

import pytest
import torch

from fastdeit import kernels
from tests.kernels import test_distillation_loss as distillation_loss

from .emulator import Fault, emulated

BARRIER = r"(?:bar|barrier|barrier\.cta)\.sync[^;]*;"


def without(pattern: str, which: int | None = None):
    """An edit of PTX text: without the match of that number, or all of them."""

    def edit(ptx: str) -> str:
        matches = list(re.finditer(rf"^\s*(?:@%\w+ )?{pattern}", ptx, re.MULTILINE))
        for match in reversed(matches if which is None else matches[which : which + 1]):
            ptx = ptx[: match.start()] + ptx[match.end() :]
        return ptx

    return edit


def attention_forward():
    """Two tiles of queries and a head of K and V that stays on chip."""
    qkv = torch.randn(1, 70, 3, 1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    return kernels.attention_qkvpacked(qkv)


def loss():
    distillation_loss.check(distillation_loss.Case(1001, "stored", "mix", heads=1), torch.bfloat16)


@pytest.mark.parametrize(
    "arch", [pytest.param(80, marks=pytest.mark.soak), 90, pytest.param(100, marks=pytest.mark.soak)]
)
def test_every_barrier_of_the_loss_is_needed(arch):
    """Sums over warps go through shared memory; the stored classes are written after other threads' zeros."""
    with emulated(arch) as launches:
        loss()
    for launch, least in zip(launches, (11, 1)):  # forward and backward
        count = len(re.findall(BARRIER, launch.ptx))
        assert count >= least
        for which in range(count):
            broken = without(BARRIER, which)(launch.ptx)
            with (
                pytest.raises(Fault, match="race"),
                emulated(arch, edit=lambda ptx, of=launch.ptx, broken=broken: broken if ptx == of else ptx),
            ):
                loss()


@pytest.mark.parametrize(
    "arch, pattern, message",
    [
        (80, BARRIER, "race"),
        (90, BARRIER, "race"),
        (100, BARRIER, "race"),
        (90, r"fence\.proxy\.async[^;]*;", "without fence.proxy.async"),
        (90, r"wgmma\.wait_group\.sync\.aligned[^;]*;", "in flight|overwritten"),
        (100, r"tcgen05\.commit[^;]*;", "waits for ever"),
    ],
)
def test_attention_without_an_instruction(arch, pattern, message):
    """Without any of its kind."""
    with emulated(arch) as launches:
        attention_forward()
    assert re.search(pattern, launches[0].ptx)
    with pytest.raises(Fault, match=message), emulated(arch, edit=without(pattern)):
        attention_forward()


def by_warp_0(after_a_barrier: bool):
    """An edit: fences by the first warp alone, where they are, or behind a barrier more."""
    fence, first = r"fence\.proxy\.async[^;]*;", "mov.u32 %rfirst, %tid.x;\nsetp.lt.u32 %pfirst, %rfirst, 32;\n"

    def edit(ptx: str) -> str:
        barrier = "bar.sync 0;\n" if after_a_barrier else ""
        ptx = re.sub(fence, lambda match: f"{barrier}{first}@%pfirst {match[0]}\n", ptx)
        return re.sub(r"^\{$", "{\n.reg .pred %pfirst;\n.reg .b32 %rfirst;", ptx, count=1, flags=re.MULTILINE)

    return edit


@pytest.mark.parametrize("arch", [90, 100])
def test_a_fence_by_one_warp_is_for_what_it_wrote_or_was_shown(arch):
    with emulated(arch):
        expected = attention_forward()
    with emulated(arch, edit=by_warp_0(after_a_barrier=True)):
        assert torch.equal(attention_forward(), expected)
    with pytest.raises(Fault, match=r"without fence\.proxy\.async"), emulated(arch, edit=by_warp_0(False)):
        attention_forward()


def test_a_wrong_product_is_a_wrong_result():
    """Operands of a product swapped: no fault, and other numbers."""

    def swapped(ptx):
        return re.sub(r"(mma\.sync[^;]*?\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2", ptx, count=1)

    with emulated(80):
        right = attention_forward()
    with emulated(80, edit=swapped):
        wrong = attention_forward()
    assert not torch.allclose(right, wrong, atol=0.05)
