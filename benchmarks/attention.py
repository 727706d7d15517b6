"""Attention at the sizes of vision transformers, forward and backward, beside every kernel PyTorch users have.

python benchmarks/attention.py [--device cpu] [--batch 256] [--heads 3 6 12] [--tokens 198 197 578 577] [--no-record]

The claim: at 197/198 and 577/578 tokens attention is bound by the bytes it must move, and a kernel made for these sizes
comes closer to that floor than those made for long sequences. Peers:

    sdpa flash, cudnn, efficient    scaled_dot_product_attention with that backend forced
    xformers                        memory_efficient_attention, which picks its own kernel
    flex                            flex_attention, compiled for the very shape

attention_qkvpacked starts from the packed projection, as a model does: the peers read strided views of it, and their
backward includes gathering the three gradients into one. attention starts from three contiguous tensors, which is the
comparison of the bare kernels. Every contender's output and gradients are checked against float32 before it is timed;
one that fails, or gives wrong numbers, shows as n/a with the reason.

The floor counts q, k, v in and the output out once (forward), and those, the output's gradient and the three gradients
(backward), over the memory's bandwidth. Forward is timed without autograd, backward alone from a kept forward.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from harness import Table, compare
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdeit.kernels import attention, attention_qkvpacked

HEAD_DIM = 64
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}  # of the largest value, and loose
Attend = Callable[..., Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


def flex() -> Attend:
    """A function of its own for each case: recompiled by itself it would turn to dynamic shapes."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # the backward is repeated from one forward
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


PEERS: dict[str, Callable[[], Attend]] = {
    "sdpa flash": lambda: partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": lambda: partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "sdpa efficient": lambda: partial(sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
    "xformers": lambda: xformers,
    "flex": flex,
}


class Case:
    """The tensors of one shape, packed (one leaf, qkv) or not (three leaves), and the contenders' functions of them."""

    def __init__(self, packed: bool, shape: tuple[int, int, int], dtype: torch.dtype, device: str, peers: list[str]):
        batch, tokens, heads = shape
        generator = torch.Generator(device).manual_seed(0)
        random = partial(torch.randn, generator=generator, device=device, dtype=dtype)
        if packed:
            self.leaves = (random(batch, tokens, 3, heads, HEAD_DIM).requires_grad_(),)
        else:
            self.leaves = tuple(random(batch, tokens, heads, HEAD_DIM).requires_grad_() for _ in range(3))
        self.grad_out = random(batch, tokens, heads, HEAD_DIM)
        self.packed, self.dtype = packed, dtype
        self.functions = {"fastdeit": attention_qkvpacked if packed else attention}
        self.functions |= {name: self._from_leaves(PEERS[name]()) for name in peers}
        self.tensor_bytes = self.grad_out.numel() * dtype.itemsize

    def _from_leaves(self, attend: Attend) -> Attend:
        return (lambda qkv: attend(*qkv.unbind(2))) if self.packed else attend

    def forward(self, function: Attend) -> Callable[[], Tensor]:
        leaves = [leaf.detach() for leaf in self.leaves]

        def call():
            with torch.no_grad():
                return function(*leaves)

        return call

    def backward(self, function: Attend) -> Callable[[], tuple[Tensor, ...]]:
        kept = []  # made in the first call: a CUDA graph must be captured on the stream the forward ran on

        def call():
            if not kept:
                kept.append(function(*self.leaves))
            return torch.autograd.grad(kept[0], self.leaves, self.grad_out, retain_graph=True)

        return call

    def usable(self, direction: str) -> tuple[dict[str, Attend], dict[str, str]]:
        """The contenders that work and are right in this direction, and the others with the reason. Ours must."""
        usable, missing = {}, {}
        expected = self._expected(direction)
        for name, function in self.functions.items():
            try:
                results = getattr(self, direction)(function)()
                self._check(results if direction == "backward" else (results,), expected)
                usable[name] = function
            except Exception as error:
                if name == "fastdeit":
                    raise
                missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        return usable, missing

    def _expected(self, direction: str, images: int = 2) -> tuple[Tensor, ...]:
        """float32 results of the first images."""
        leaves = [leaf.detach()[:images].float().requires_grad_() for leaf in self.leaves]
        out = self._from_leaves(partial(sdpa, backend=SDPBackend.MATH))(*leaves)
        return (out,) if direction == "forward" else torch.autograd.grad(out, leaves, self.grad_out[:images].float())

    def _check(self, results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
        for result, right in zip(results, expected, strict=True):
            error = ((result[: len(right)].float() - right).abs().max() / right.abs().max()).item()
            if not error <= TOLERANCE[self.dtype]:
                raise ValueError(f"wrong numbers, off by {error:.1e} of the largest")


def measure(table: Table, packed: bool, shape: tuple[int, int, int], dtype, seconds: float, peers: list[str]) -> None:
    case = Case(packed, shape, dtype, table.device, peers)
    operation = "attention_qkvpacked" if packed else "attention"
    for direction, tensors in (("forward", 4), ("backward", 8)):
        usable, missing = case.usable(direction)
        calls = {name: getattr(case, direction)(function) for name, function in usable.items()}
        timings = compare(calls, device=table.device, seconds=seconds)
        name = f"{direction}, {' x '.join(map(str, shape))} x {HEAD_DIM} {str(dtype).removeprefix('torch.')}"
        table.add(operation, name, timings, floor_bytes=tensors * case.tensor_bytes, missing=missing)
    table.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--heads", type=int, nargs="+", default=[3, 6, 12])
    parser.add_argument("--tokens", type=int, nargs="+", default=[198, 197, 578, 577])
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="beside ours")
    parser.add_argument("--seconds", type=float, default=0.15, help="of measuring for each contender")
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    table = Table("attention", arguments.device, record=not arguments.no_record)
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    for packed in (True, False):
        # FlexAttention compiles for every shape, which takes the longest: with the packed layout only.
        peers = [name for name in arguments.peers if packed or name != "flex"]
        for tokens in arguments.tokens:
            for heads in arguments.heads:
                measure(table, packed, (arguments.batch, tokens, heads), dtype, arguments.seconds, peers)


if __name__ == "__main__":
    main()
