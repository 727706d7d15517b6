"""Claim: at the sizes of vision transformers, attention made for them beats every kernel PyTorch users have.

    python -m benchmarks attention [--batch 256] [--heads 3 6 12] [--tokens 198 197 578 577] [--peers "sdpa cudnn" flex]

At 197/198 and 577/578 tokens attention is bound by the bytes it must move, and a kernel made for these sizes comes
closer to that floor than those made for long sequences. Peers:

    sdpa flash, cudnn, efficient    scaled_dot_product_attention with that backend forced
    xformers                        memory_efficient_attention, which picks its own kernel
    flex                            flex_attention, compiled for the very shape

attention_qkvpacked starts from the packed projection, as a model does: the peers read strided views of it, and their
backward includes gathering the three gradients into one. attention starts from three contiguous tensors, which is the
comparison of the bare kernels. Every contender's output and gradients are checked against float32 before it is timed;
one that fails, or gives wrong numbers, shows as n/a with the reason.

The floor counts q, k, v in and the output out once (forward), and those, the output's gradient and the three gradients
(backward), or the products (two forward, five backward), whichever takes longer.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdeit.kernels import attention, attention_qkvpacked

from .kernel_table import KernelTable
from .record import parser
from .timing import compiled

HEAD_DIM = 64
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}  # of the largest value, and loose
Attend = Callable[..., Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


def flex(quick: bool) -> Attend:
    """A function of its own for each case: recompiled by itself it would turn to dynamic shapes."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    function = compiled(flex_attention, quick=quick)
    return lambda q, k, v: function(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


PEERS: dict[str, Callable[[bool], Attend]] = {  # given whether the run is a quick one
    "sdpa flash": lambda quick: partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": lambda quick: partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "sdpa efficient": lambda quick: partial(sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
    "xformers": lambda quick: xformers,
    "flex": flex,
}


class Case:
    """The tensors of one shape, packed (one leaf, qkv) or not (three leaves), and the contenders' functions of them."""

    def __init__(
        self, packed: bool, shape: tuple[int, int, int], dtype: torch.dtype, device: str, peers: list[str], quick: bool
    ):
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
        self.functions |= {name: self._from_leaves(PEERS[name](quick)) for name in peers}
        self.tensor_bytes = self.grad_out.numel() * dtype.itemsize
        self.product_flops = 2 * batch * heads * tokens**2 * HEAD_DIM

    def _from_leaves(self, attend: Attend) -> Attend:
        return (lambda qkv: attend(*qkv.unbind(2))) if self.packed else attend

    def forward(self, function: Attend) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [leaf.detach() for leaf in self.leaves]

        def call():
            with torch.no_grad():
                return (function(*leaves),)

        return call

    def forward_and_backward(self, function: Attend) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(function(*self.leaves), self.leaves, self.grad_out)

    def usable(self, direction: Callable) -> tuple[dict[str, Callable], dict[str, str]]:
        """The contenders that work and are right in this direction, and the others with the reason. Ours must."""
        usable, missing, expected = {}, {}, self._expected(direction)
        for name, function in self.functions.items():
            try:
                call = direction(self, function)
                self._check(call(), expected)
                usable[name] = call
            except Exception as error:
                if name == "fastdeit":
                    raise
                missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        return usable, missing

    def _expected(self, direction: Callable, images: int = 2) -> tuple[Tensor, ...]:
        """float32 results of the first images."""
        leaves = [leaf.detach()[:images].float().requires_grad_() for leaf in self.leaves]
        out = self._from_leaves(partial(sdpa, backend=SDPBackend.MATH))(*leaves)
        forward = direction is Case.forward
        return (out,) if forward else torch.autograd.grad(out, leaves, self.grad_out[:images].float())

    def _check(self, results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
        for result, right in zip(results, expected, strict=True):
            error = ((result[: len(right)].float() - right).abs().max() / right.abs().max()).item()
            if not error <= TOLERANCE[self.dtype]:
                raise ValueError(f"wrong numbers, off by {error:.1e} of the largest")


# What is timed: name, how, and how many tensors it moves and products it makes.
DIRECTIONS = (("forward", Case.forward, 4, 2), ("forward + backward", Case.forward_and_backward, 12, 7))


def measure(table: KernelTable, packed: bool, shape: tuple[int, int, int], dtype, peers: list[str]) -> None:
    case = Case(packed, shape, dtype, table.device, peers, table.quick)
    for direction, function, tensors, products in DIRECTIONS:
        calls, missing = case.usable(function)
        table.measure(
            "attention_qkvpacked" if packed else "attention",
            f"{direction}, {' x '.join(map(str, shape))} x {HEAD_DIM} {str(dtype).removeprefix('torch.')}",
            calls, missing=missing, floor_bytes=tensors * case.tensor_bytes, floor_flops=products * case.product_flops,
            headline=packed and shape[1] == 198 and shape[2] in (6, 12),
        )  # fmt: skip
    table.write()


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--batch", type=int, default=256)
    own.add_argument("--heads", type=int, nargs="+", default=[3, 6, 12])
    own.add_argument("--tokens", type=int, nargs="+", default=[198, 197, 578, 577])
    own.add_argument(
        "--peers", nargs="*", choices=list(PEERS), default=list(PEERS), metavar="NAME",
        help="beside ours: " + ", ".join(PEERS),
    )  # fmt: skip
    own.add_argument("--seconds", type=float, default=0.15, help="of measuring for each contender")
    arguments = own.parse_args()
    if arguments.quick:
        arguments.batch, arguments.heads, arguments.tokens = 1, [1], [17]
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    table = KernelTable("attention", arguments, dtype, arguments.seconds)
    for packed in (True, False):
        # FlexAttention compiles for every shape, which takes the longest: with the packed layout only.
        peers = [name for name in arguments.peers if packed or name != "flex"]
        for tokens in arguments.tokens:
            for heads in arguments.heads:
                measure(table, packed, (arguments.batch, tokens, heads), dtype, peers)


if __name__ == "__main__":
    main()
