"""Shapes at which the tests and benchmarks/compile_report.py compile the attention kernels."""

from collections.abc import Iterator

import torch

from fastdeit.kernels.compile_case import ARCHITECTURES, CompileCase

from .backward import backward_kernel, backward_kv_kernel, backward_q_kernel
from .configs import FULL_GPU, BackwardConfig, ForwardConfig, backward_config, forward_config
from .forward import forward_kernel
from .launch import padded_columns

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def cases() -> Iterator[CompileCase]:
    """The shapes DeiT trains at, and the largest tiles of the other head_dims."""
    for tokens, head_dim in ((198, 64), (578, 64), (578, 128)):
        yield from shape_cases(tokens, head_dim, torch.bfloat16)
    yield from shape_cases(198, 64, torch.float32)


def shape_cases(tokens: int, head_dim: int, dtype: torch.dtype) -> Iterator[CompileCase]:
    """The kernels of one shape, once for every group of architectures that share a configuration."""
    shape = tokens, padded_columns(head_dim), dtype
    name = f"N={tokens} D={head_dim} {TYPES[dtype]}"
    for config, architectures in _by_config(forward_config, shape):
        yield forward_case(f"attention forward {name}", tokens, head_dim, dtype, config, architectures)
    # With many heads and with few, which may take one launch and two.
    for items, few in ((FULL_GPU, ""), (1, " few heads")):
        for config, architectures in _by_config(backward_config, (*shape, items)):
            if not few or backward_config(architectures[0], *shape, FULL_GPU) != config:
                title = f"attention backward{few} {name}"
                yield from backward_cases(title, tokens, head_dim, dtype, config, architectures)


def forward_case(
    name: str, tokens: int, head_dim: int, dtype: torch.dtype, config: ForwardConfig, architectures=ARCHITECTURES
) -> CompileCase:
    tiles = config.tiles(tokens)
    constexprs = {
        "HEAD_DIM": head_dim, "COLS": padded_columns(head_dim), "PRECISION": "ieee",
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "RESIDENT": config.keys == "resident",
        "TILES": tiles, "STARTS": tuple(sum(tiles[:i]) for i in range(len(tiles))),
    }  # fmt: skip
    if config.keys == "resident":
        constexprs["splits"] = 1
    return _case(name, forward_kernel, constexprs, dtype, architectures, config.num_warps, config.num_stages)


def backward_cases(
    name: str, tokens: int, head_dim: int, dtype: torch.dtype, config: BackwardConfig, architectures=ARCHITECTURES
) -> Iterator[CompileCase]:
    columns = max(64, padded_columns(head_dim))
    shared = {"HEAD_DIM": head_dim, "COLS": columns, "PRECISION": "ieee"}
    if config.one is not None:
        keys, queries, *launch = config.one
        blocks = -(-tokens // keys)
        one = {**shared, "KV_ROWS": keys, "BLOCK_M": queries, "BLOCKS": blocks, "grad_lse_ptr": None}
        one |= {"dq_sum_ptr": None} if blocks == 1 else {}
        yield _case(name, backward_kernel, one, dtype, architectures, *launch)
        return
    kv = {**shared, "KV_ROWS": config.kv.keys, "BLOCK_M": config.kv.queries}
    q = {**shared, "BLOCK_M": config.q.queries, "BLOCK_N": config.q.keys, "grad_lse_ptr": None}
    yield _case(f"{name} dK dV", backward_kv_kernel, kv, dtype, architectures, *config.kv[2:])
    yield _case(f"{name} dQ", backward_q_kernel, q, dtype, architectures, *config.q[2:])


def _case(name, kernel, constexprs, dtype, architectures, num_warps, num_stages) -> CompileCase:
    floats = ("lse_ptr", "rows_ptr", "grad_lse_ptr", "dq_sum_ptr")
    types = {"scale": "fp32"} | dict.fromkeys(floats, "*fp32")
    names = [argument for argument in kernel.arg_names if argument not in constexprs]
    signature = {a: types.get(a, f"*{TYPES[dtype]}" if a.endswith("_ptr") else "i32") for a in names}
    strides = tuple(a for a in names if a[1:] in ("_b", "_n", "_h") or a == "padded")
    half = dtype != torch.float32
    return CompileCase(name, kernel, signature, constexprs, strides, num_warps, num_stages, half, architectures)


def _by_config(config_of, shape) -> Iterator[tuple]:
    configs = {arch: config_of(arch, *shape) for arch in ARCHITECTURES}
    for config in dict.fromkeys(configs.values()):
        yield config, tuple(arch for arch in ARCHITECTURES if configs[arch] == config)
