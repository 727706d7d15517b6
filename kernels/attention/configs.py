"""Which tiles and how many warps, by architecture, dtype, tokens and head_dim. A static table: autotuning inside
torch.compile would pick one configuration for all shapes, and cannot run while a CUDA graph is captured.

`columns` are those of the tiles that hold head_dim (backend.column_parts): 16, 32, 48, 64, 80, 96 or 128.
"""

from typing import NamedTuple

import torch


class ForwardConfig(NamedTuple):
    block_m: int  # rows of Q at a time
    block_n: int  # largest tile of keys
    keys: str  # "resident": K and V of a head stay on chip while a program walks over Q, all in static tiles;
    # "tail": whole tiles in a loop, the rest in static tiles of their size; "loop": all in a masked loop
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # registers a thread at most, so that more programs share a multiprocessor

    def tiles(self, tokens: int) -> tuple[int, ...]:
        """The static tiles of keys."""
        return () if self.keys == "loop" else key_tiles(tokens, self.block_n, self.keys == "resident")

    @property
    def name(self) -> str:
        kind = "resident" if self.keys == "resident" else "streaming"
        return f"{kind} {_launch(self.block_m, self.block_n, *self[-3:])}"

    def splits(self, tokens: int, items: int) -> int:
        """Programs per (batch, head) item. A resident program takes all rows of Q unless the GPU would stay empty."""
        return 1 if self.keys == "resident" and items >= FULL_GPU else -(-tokens // self.block_m)


FULL_GPU = 264  # programs that give each of an H100's or H200's 132 multiprocessors two


def forward_config(arch: int, tokens: int, columns: int, dtype: torch.dtype) -> ForwardConfig:
    if dtype == torch.float32:  # without tensor cores, and static tiles cost registers
        return ForwardConfig(64, 32, "loop", 8, 1)
    if _hopper(arch) and tokens <= 64:  # so few need no limit, with which ptxas takes more than without
        return ForwardConfig(64, 64, "resident", 4, 1)
    if _hopper(arch) and tokens <= 256 and columns <= 80:
        return ForwardConfig(64, 64, "resident", 4, 1, 168)
    if _hopper(arch):
        block_n, stages = next(tile for limit, tile in HOPPER_STREAMING if columns <= limit)
        return ForwardConfig(64, block_n, "tail", 4, stages, 128)
    if columns > 64:
        return ForwardConfig(128, 64 if _data_center(arch) else 32, "tail", 8, 2)
    return ForwardConfig(64, 128, "resident", 4, 1) if tokens <= 256 else ForwardConfig(128, 64, "tail", 8, 3)


# Keys at a time and stages, by columns up to: what leaves room for four programs a multiprocessor.
HOPPER_STREAMING = ((64, (64, 3)), (80, (64, 2)), (96, (32, 3)), (128, (32, 2)))


class Tiles(NamedTuple):
    keys: int
    queries: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


class BackwardConfig(NamedTuple):
    one: Tiles | None  # the one launch: a program holds blocks of keys in turn; None where two launches are made:
    q: Tiles  # backward_q holds queries, keys pass by,
    kv: Tiles  # backward_kv holds keys, queries pass by

    @property
    def name(self) -> str:
        if self.one is not None:
            return f"one launch {_launch(*self.one)}"
        return f"two launches, dQ {_launch(*self.q)}, dK dV {_launch(*self.kv)}"


def _launch(rows: int, columns: int, num_warps: int, num_stages: int, maxnreg: int | None) -> str:
    return f"{rows} x {columns} w{num_warps} s{num_stages}" + ("" if maxnreg is None else f" r{maxnreg}")


def backward_config(arch: int, tokens: int, columns: int, dtype: torch.dtype, items: int) -> BackwardConfig:
    """items: batch * heads, the programs of one launch."""
    if dtype == torch.float32:
        side = 32 if columns <= 64 else 16
        return BackwardConfig(Tiles(side, side, 8, 1) if tokens <= side else None, *2 * (Tiles(side, side, 8, 1),))
    one = next((tiles for limit, tiles in _one_launch(arch, columns) if tokens <= limit), None)
    if one is not None and tokens > one.keys and items < FULL_GPU // 2:
        one = None  # more programs are worth more than fewer products
    if _hopper(arch):
        return BackwardConfig(one, *next(tiles for limit, tiles in HOPPER_TWO_LAUNCHES if columns <= limit))
    if columns <= 64:
        return BackwardConfig(one, Tiles(64, 128, 8, 2), Tiles(128, 64, 8, 3 if _data_center(arch) else 2))
    if _data_center(arch):
        return BackwardConfig(one, Tiles(64, 128, 8, 2), Tiles(128, 32, 8, 2))
    return BackwardConfig(one, Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2))


# dQ, then dK and dV, by columns up to.
HOPPER_TWO_LAUNCHES = (
    (64, (Tiles(64, 64, 4, 3, 128), Tiles(64, 32, 4, 3, 128))),
    (96, (Tiles(64, 64, 4, 2, 168), Tiles(64, 32, 4, 3, 168))),
    (128, (Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2))),
)
# (tokens up to, tiles), for up to 64 columns and for more. The one launch takes head_dim as one tile of at least 64
# columns. What is missing would spill; beyond 1,024 tokens the scratch for dQ would be large. On Hopper three small
# programs a multiprocessor hide each other's waits, which one large one, whose keys fill the registers, cannot: two
# thirds of its cycles by the model of benchmarks/attention_cycles.py, which knows no other architecture. By it two
# launches win with 64 columns somewhere between 257 and 578 tokens, and always where they need not pad head_dim.
ONE_LAUNCH = {
    80: ((64, Tiles(64, 32, 4, 2)), (128, Tiles(128, 32, 8, 2)), (1024, Tiles(64, 32, 8, 2))),
    90: ((384, Tiles(64, 32, 4, 2, 168)),),
    100: (
        (64, Tiles(64, 64, 4, 2)), (128, Tiles(128, 64, 8, 2)), (256, Tiles(256, 32, 8, 2)),
        (1024, Tiles(128, 32, 8, 2)),
    ),
}  # fmt: skip
ONE_LAUNCH_WIDE = {
    80: ((64, Tiles(64, 32, 8, 2)),),
    100: ((64, Tiles(64, 32, 8, 2)), (128, Tiles(128, 32, 8, 2))),
}  # fmt: skip


def _one_launch(arch: int, columns: int) -> tuple:
    if _hopper(arch):
        return ONE_LAUNCH[90] if columns == 64 else ()
    return (ONE_LAUNCH if columns <= 64 else ONE_LAUNCH_WIDE)[100 if _data_center(arch) else 80]


def _hopper(arch: int) -> bool:
    return 90 <= arch < 100


def _data_center(arch: int) -> bool:
    """Hopper and data-center Blackwell: 227 KB of shared memory and asynchronous matrix instructions."""
    return 90 <= arch < 120


def key_tiles(tokens: int, block_n: int, all_static: bool) -> tuple[int, ...]:
    """Powers of two from 16 up, whose sum is at least what is left after whole tiles of block_n, in one tile or two."""
    whole, rest = divmod(tokens - 1, block_n)
    rest += 1
    single = max(16, 1 << (rest - 1).bit_length())
    second = max(16, 1 << (rest - single // 2 - 1).bit_length())
    last = (single,) if single == 16 or second > single // 4 else (single // 2, second)
    return (block_n,) * (whole if all_static else 0) + last
