"""Which tiles the attention kernels take at a shape: those of the table (configs), or what a measurement put in their
place.

    shape = tiles.Shape(arch=90, queries=198, keys=198, head_dim=64, dtype=torch.bfloat16)
    for name, config in tiles.forward_candidates(shape).items(): ...    # the table's own first
    tiles.use(shape, forward=config)                                    # from the next launch on

The operators only read. Nothing is compiled anew by torch.compile: they look at each call, inside the operator, which
Dynamo does not enter; a CUDA graph keeps the tiles it was captured with.
"""

from typing import NamedTuple

import torch

from fastdeit.kernels.backend import column_parts, padded_columns

from . import configs
from .configs import BackwardConfig, ForwardConfig, Tiles


class Shape(NamedTuple):
    """What tiles depend on."""

    arch: int  # 80, 90, 100, ...
    queries: int
    keys: int
    head_dim: int
    dtype: torch.dtype


_forward: dict[Shape, ForwardConfig | None] = {}
_backward: dict[Shape, BackwardConfig | None] = {}


def use(shape: Shape, *, forward: ForwardConfig | None = None, backward: BackwardConfig | None = None) -> None:
    """From now on the kernels take these at this shape; None: the table's."""
    _forward[shape], _backward[shape] = forward, backward


def forward(shape: Shape) -> ForwardConfig:
    columns = sum(column_parts(shape.head_dim))
    return _forward.get(shape) or configs.forward_config(shape.arch, shape.keys, columns, shape.dtype)


def backward(shape: Shape, items: int) -> BackwardConfig:
    """items: batch * heads, the programs of one launch."""
    columns = sum(column_parts(shape.head_dim))
    return _backward.get(shape) or configs.backward_config(shape.arch, shape.keys, columns, shape.dtype, items)


def backward_columns(config: BackwardConfig, head_dim: int) -> tuple[int, ...]:
    """Of the tiles that hold head_dim. In the one launch dQᵀ has a row for each, and wgmma takes no fewer than 64."""
    return column_parts(head_dim) if config.one is None else (max(64, padded_columns(head_dim)),)


# ---------------------------------------------------------------------------------------------------------------------
# What is worth timing: it compiles with few spills, if any (benchmarks/compile_report.py), and leads or nearly leads at
# some length by the model of benchmarks/attention_cycles.py.

RESIDENT = [(64, 64, 1, 168), (64, 64, 1, None), (64, 128, 1, 168)]  # up to 256 keys; queries, keys, stages, registers
STREAMING: dict[bool, list[tuple]] = {  # by more than 64 columns or not: queries, keys, warps, stages, registers
    False: [
        (64, 64, 4, 2, 128), (64, 64, 4, 3, 128), (64, 32, 4, 3, 128), (128, 64, 8, 2, None), (128, 64, 8, 3, None),
        (128, 128, 8, 2, None),
    ],
    True: [
        (64, 64, 4, 2, 128), (64, 32, 4, 3, 128), (64, 32, 4, 2, 128), (64, 64, 4, 2, None), (128, 64, 8, 2, None),
        (128, 32, 8, 2, None),
    ],
}  # fmt: skip
ONE_LAUNCH: dict[bool, list[tuple]] = {
    False: [
        (64, 32, 4, 2, 168), (64, 32, 4, 3, 168), (64, 32, 4, 2, None), (64, 32, 4, 3, None), (128, 32, 8, 3, None),
        (256, 32, 8, 3, None),
    ],
    True: [(64, 32, 8, 2, None), (128, 32, 8, 2, None)],
}  # fmt: skip
TWO_LAUNCHES: dict[bool, list[tuple]] = {  # dQ, then dK and dV
    False: [
        ((64, 64, 4, 2, 128), (64, 32, 4, 3, 128)), ((64, 64, 4, 3, 128), (64, 32, 4, 2, 168)),
        ((64, 128, 8, 3, None), (128, 64, 8, 3, None)),
    ],
    True: [
        ((64, 64, 4, 2, 168), (64, 32, 4, 3, 168)), ((64, 64, 4, 2, None), (64, 32, 4, 2, None)),
        ((64, 128, 8, 2, None), (128, 32, 8, 2, None)), ((64, 64, 8, 2, None), (64, 64, 8, 2, None)),
    ],
}  # fmt: skip


def forward_candidates(shape: Shape) -> dict[str, ForwardConfig]:
    """By a name that stays the same from version to version; the table's own first, in float32 alone."""
    columns = sum(column_parts(shape.head_dim))
    found = [configs.forward_config(shape.arch, shape.keys, columns, shape.dtype)]
    if shape.dtype != torch.float32:
        if shape.keys <= 256 and columns <= 80:
            found += [ForwardConfig(m, n, "resident", 4, stages, maxnreg) for m, n, stages, maxnreg in RESIDENT]
        found += [ForwardConfig(m, n, "tail", *launch) for m, n, *launch in STREAMING[columns > 64]]
    return {config.name: config for config in found}


def backward_candidates(shape: Shape, items: int) -> dict[str, BackwardConfig]:
    """As `forward_candidates`. items: batch * heads."""
    columns = sum(column_parts(shape.head_dim))
    own = configs.backward_config(shape.arch, shape.keys, columns, shape.dtype, items)
    found = [own]
    if shape.dtype != torch.float32:
        one = [Tiles(*tiles) for tiles in ONE_LAUNCH[columns > 64]]
        # A program whose block of keys is half empty computes for nothing.
        found += [own._replace(one=tiles) for tiles in one if tiles.keys < 2 * max(64, shape.keys)]
        found += [BackwardConfig(None, Tiles(*q), Tiles(*kv)) for q, kv in TWO_LAUNCHES[columns > 64]]
    return {config.name: config for config in found}
