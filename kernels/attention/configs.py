"""Which tiles and how many warps, by architecture, dtype, tokens and head_dim. A static table: autotuning inside
torch.compile would pick one configuration for all shapes, and cannot run while a CUDA graph is captured.

`columns` is head_dim rounded up to a power of two: 32, 64 or 128.
"""

from typing import NamedTuple

import torch


class ForwardConfig(NamedTuple):
    block_m: int  # rows of Q at a time
    block_n: int  # largest tile of keys
    resident: bool  # K and V of a head stay on chip while a program walks over Q
    num_warps: int
    num_stages: int

    def splits(self, tokens: int, items: int) -> int:
        """Programs per (batch, head) item. A resident program takes all rows of Q unless the GPU would stay empty."""
        blocks = -(-tokens // self.block_m)
        return 1 if self.resident and items >= FULL_GPU else blocks


FULL_GPU = 264  # programs that give each of an H100's or H200's 132 multiprocessors two


def forward_config(arch: int, tokens: int, columns: int, dtype: torch.dtype) -> ForwardConfig:
    if dtype == torch.float32:
        return ForwardConfig(32, 32, False, 4, 1)
    if tokens <= 256 and columns <= 64:
        return ForwardConfig(64, 128, True, 4, 1)
    return ForwardConfig(128, 64, False, 8, 2)


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
        return BackwardConfig(32, 32, 4, 1, 32, 32, 4, 1)
    queries = (64, 64, 4, 2)
    if columns <= 64 and tokens <= 256:
        rows = max(64, 1 << (tokens - 1).bit_length())
        return BackwardConfig(rows, 32, rows // 16, 3, *queries)
    return BackwardConfig(128, 32, 8, 3, *queries)


def key_tiles(tokens: int, block_n: int, resident: bool) -> tuple[int, ...]:
    """Static tiles of keys: powers of two from 16 up, whose sum is at least what is left after whole tiles of block_n.

    A streamed kernel takes the whole tiles in a loop and gets only the rest, 1 to block_n keys, as one tile or two.
    """
    whole, rest = divmod(tokens - 1, block_n)
    rest += 1
    single = max(16, 1 << (rest - 1).bit_length())
    second = max(16, 1 << (rest - single // 2 - 1).bit_length())
    last = (single,) if single == 16 or second > single // 4 else (single // 2, second)
    return (block_n,) * (whole if resident else 0) + last
