"""Which tiles and how many warps, by architecture, dtype, tokens and head_dim. A static table: autotuning inside
torch.compile would pick one configuration for all shapes, and cannot run while a CUDA graph is captured.

`columns` is head_dim rounded up to a power of two: 32, 64 or 128.
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

    def tiles(self, tokens: int) -> tuple[int, ...]:
        """The static tiles of keys."""
        return () if self.keys == "loop" else key_tiles(tokens, self.block_n, self.keys == "resident")

    def splits(self, tokens: int, items: int) -> int:
        """Programs per (batch, head) item. A resident program takes all rows of Q unless the GPU would stay empty."""
        return 1 if self.keys == "resident" and items >= FULL_GPU else -(-tokens // self.block_m)


FULL_GPU = 264  # programs that give each of an H100's or H200's 132 multiprocessors two


def forward_config(arch: int, tokens: int, columns: int, dtype: torch.dtype) -> ForwardConfig:
    if dtype == torch.float32:  # without tensor cores, and static tiles cost registers
        return ForwardConfig(64, 32, "loop", 8, 1)
    if columns == 128:
        return ForwardConfig(128, 64 if _data_center(arch) else 32, "tail", 8, 2)
    return ForwardConfig(64, 128, "resident", 4, 1) if tokens <= 256 else ForwardConfig(128, 64, "tail", 8, 3)


class BackwardConfig(NamedTuple):
    kv_rows: int  # keys a program of backward_kv holds; all of them when tokens <= kv_rows, and one launch does it all
    kv_block_m: int  # rows of Q it takes at a time
    kv_warps: int
    kv_stages: int
    q_block_m: int  # the same for backward_q: rows of Q a program holds
    q_block_n: int  # keys it takes at a time
    q_warps: int
    q_stages: int


def backward_config(arch: int, tokens: int, columns: int, dtype: torch.dtype) -> BackwardConfig:
    if dtype == torch.float32:
        return BackwardConfig(*((32, 32, 8, 1, 32, 32, 8, 1) if columns <= 64 else (16, 16, 8, 1, 16, 16, 8, 1)))
    by_query = (128 if columns <= 64 or _data_center(arch) else 64, 64, 8, 2)
    table = HOPPER_KV if _data_center(arch) else AMPERE_KV
    return BackwardConfig(*next(by_key for limit, by_key in table[columns == 128] if tokens <= limit), *by_query)


# (tokens up to, (kv_rows, kv_block_m, kv_warps, kv_stages)), for columns up to 64 and for 128.
HOPPER_KV = (
    ((64, (64, 64, 4, 2)), (128, (128, 64, 8, 2)), (256, (256, 32, 8, 2)), (4096, (128, 64, 8, 3))),
    ((64, (64, 32, 8, 2)), (4096, (128, 32, 8, 2))),
)
AMPERE_KV = (
    ((64, (64, 32, 4, 2)), (128, (128, 32, 8, 2)), (4096, (128, 64, 8, 2))),
    ((64, (64, 32, 8, 2)), (4096, (64, 64, 8, 2))),
)


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
