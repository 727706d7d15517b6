"""Which tiles are fastest: times the candidates for the table in kernels/attention/configs.py, and prints the winners.

    python -m benchmarks.tune_attention [--tokens 198 578] [--head-dim 64] [--batch 256] [--heads 6] [--only forward]

The table is static (see there why), so it is tuned by hand with this at each architecture: what wins clearly goes into
it. All candidates are first run once, in several processes, which compiles them; those that do not compile or do not
fit are left out; then they are timed in turns, coldest cache first, as everywhere here. The entry of the table is the
first contender, so the factors are gains over it. Writes records/DEVICE/tune_attention.csv.
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import NamedTuple

import torch

from fastdeit.kernels.attention import tiles, triton_backward, triton_forward
from fastdeit.kernels.attention.configs import BackwardConfig, ForwardConfig, Tiles
from fastdeit.kernels.backend import architecture

from .kernel_table import KernelTable
from .record import parser


class Shape(NamedTuple):
    batch: int
    tokens: int
    heads: int
    head_dim: int


class Tensors:
    """Input and outputs of one shape, and the two directions as calls."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str):
        batch, tokens, heads, head_dim = shape
        qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=dtype)
        self.qkv, self.scale = qkv.unbind(2), head_dim**-0.5
        self.out, self.grad_out = (torch.randn_like(self.qkv[0].contiguous()) for _ in range(2))
        self.lse = torch.zeros(batch, heads, tokens, device=device)
        self.grads = torch.empty_like(qkv).unbind(2)
        self.forward()

    def forward(self) -> None:
        triton_forward.attention_forward(*self.qkv, self.out, self.lse, self.scale)

    def backward(self) -> None:
        triton_backward.attention_backward(self.grad_out, *self.qkv, self.out, self.lse, self.scale, None, self.grads)


Candidate = ForwardConfig | BackwardConfig


def candidates(direction: str, shape: Shape, dtype: torch.dtype, device: str, quick: bool) -> list[Candidate]:
    """The table's own entry first."""
    if direction == "forward":
        own, *others = tiles.forward_candidates(_key(shape, dtype, device)).values()
        grid = list(_forward(shape.tokens))
    else:
        own, *others = tiles.backward_candidates(_key(shape, dtype, device), shape.batch * shape.heads).values()
        grid = list(_backward(own))
    found = list(dict.fromkeys([own, *others, *grid]))
    return found[:: len(found) - 1] if quick else found  # the first and the last


def _key(shape: Shape, dtype: torch.dtype, device: str) -> tiles.Shape:
    arch = architecture(torch.empty(0, device=device))
    return tiles.Shape(arch, shape.tokens, shape.tokens, shape.head_dim, dtype)


def _forward(tokens: int) -> Iterator[ForwardConfig]:
    for block_m, block_n, warps, maxnreg in product((64, 128), (32, 64, 128), (4, 8), (None, 128, 168)):
        if tokens <= 256:
            yield ForwardConfig(block_m, block_n, "resident", warps, 1, maxnreg)
        for stages in (2, 3):
            yield ForwardConfig(block_m, block_n, "tail", warps, stages, maxnreg)


def _backward(own: BackwardConfig) -> Iterator[BackwardConfig]:
    for keys, queries, warps, stages in product((64, 128, 256), (32, 64), (4, 8), (2, 3)):
        for maxnreg in (None, 128, 168):
            yield own._replace(one=Tiles(keys, queries, warps, stages, maxnreg))
    for keys, queries, warps, stages in product((64, 128), (32, 64), (4, 8), (2, 3)):
        if own.q.queries % queries == 0:
            yield own._replace(one=None, kv=Tiles(keys, queries, warps, stages))
    for keys, queries, warps, stages in product((32, 64), (64, 128), (4, 8), (2, 3)):
        if queries % own.kv.queries == 0:
            yield own._replace(one=None, q=Tiles(keys, queries, warps, stages))


def call(tensors: Tensors, direction: str, config: Candidate) -> Callable[[], None]:
    q = tensors.qkv[0]
    shape = tiles.Shape(architecture(q), q.shape[1], q.shape[1], q.shape[3], q.dtype)

    def run():
        tiles.use(shape, **{direction: config})
        getattr(tensors, direction)()
        tiles.use(shape)

    return run


def why_not(direction: str, shape: Shape, dtype: torch.dtype, device: str, config: Candidate) -> str | None:
    """Compiles and runs a candidate once; what went wrong, if anything. In a process of its own: a kernel that reads
    where it must not would take the others with it."""
    try:
        call(Tensors(shape, dtype, device), direction, config)()
        if device != "cpu":
            torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None


def tune(table: KernelTable, direction: str, shape: Shape, dtype: torch.dtype) -> None:
    found = candidates(direction, shape, dtype, table.device, table.quick)
    tasks = [(direction, shape, dtype, table.device, config) for config in found]
    if table.quick:
        reasons = [why_not(*task) for task in tasks]
    else:
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            reasons = list(pool.map(why_not, *zip(*tasks)))
    tensors = Tensors(shape, dtype, table.device)
    names = [f"{'table: ' if i == 0 else ''}{config.name}" for i, config in enumerate(found)]
    calls = {name: call(tensors, direction, c) for name, c, reason in zip(names, found, reasons) if reason is None}
    missing = {name: reason for name, reason in zip(names, reasons) if reason is not None}
    element = shape.batch * shape.tokens * shape.heads * shape.head_dim * dtype.itemsize
    product_flops = 2 * shape.batch * shape.heads * shape.tokens**2 * shape.head_dim
    moved, products = (4, 2) if direction == "forward" else (8, 5)
    table.measure(
        direction, " x ".join(map(str, shape)), calls, missing=missing,
        floor_bytes=moved * element, floor_flops=products * product_flops,
    )  # fmt: skip
    table.write()


def main() -> None:
    own: argparse.ArgumentParser = parser(__doc__)
    own.add_argument("--tokens", type=int, nargs="+", default=[198, 578])
    own.add_argument("--head-dim", type=int, default=64)
    own.add_argument("--batch", type=int, default=256)
    own.add_argument("--heads", type=int, default=6)
    own.add_argument("--only", choices=("forward", "backward"))
    own.add_argument("--seconds", type=float, default=0.1, help="of measuring for each candidate")
    arguments = own.parse_args()
    if arguments.quick:
        arguments.batch, arguments.heads, arguments.tokens = 1, 1, [33]
    dtype = torch.bfloat16 if arguments.device != "cpu" else torch.float16
    table = KernelTable("tune_attention", arguments, dtype, arguments.seconds)
    for tokens in arguments.tokens:
        for direction in ("forward", "backward"):
            if arguments.only in (None, direction):
                tune(table, direction, Shape(arguments.batch, tokens, arguments.heads, arguments.head_dim), dtype)


if __name__ == "__main__":
    main()
