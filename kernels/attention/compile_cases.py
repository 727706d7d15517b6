"""Shapes at which the tests and benchmarks/compile_report.py compile the attention kernels."""

from collections.abc import Iterator

import torch

from fastdeit.kernels.compile_case import ARCHITECTURES, CompileCase

from .backward import backward_kv_kernel, backward_q_kernel
from .configs import BackwardConfig, ForwardConfig, backward_config, forward_config
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
    for config, architectures in _by_config(backward_config, shape):
        yield from backward_cases(f"attention backward {name}", tokens, head_dim, dtype, config, architectures)


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
    shared = {"HEAD_DIM": head_dim, "COLS": columns, "PRECISION": "ieee", "grad_lse_ptr": None}
    one_launch = tokens <= config.kv_rows
    kv = {**shared, "KV_ROWS": config.kv_rows, "BLOCK_M": config.kv_block_m, "ONE_LAUNCH": one_launch}
    if one_launch:
        kv["splits"] = 1
        yield _case(name, backward_kv_kernel, kv, dtype, architectures, config.kv_warps, config.kv_stages)
        return
    q = {**shared, "BLOCK_M": config.q_block_m, "BLOCK_N": config.q_block_n}
    yield _case(f"{name} dK dV", backward_kv_kernel, kv, dtype, architectures, config.kv_warps, config.kv_stages)
    yield _case(f"{name} dQ", backward_q_kernel, q, dtype, architectures, config.q_warps, config.q_stages)


def _case(name, kernel, constexprs, dtype, architectures, num_warps, num_stages) -> CompileCase:
    types = {"lse_ptr": "*fp32", "rows_ptr": "*fp32", "grad_lse_ptr": "*fp32", "scale": "fp32"}
    names = [argument for argument in kernel.arg_names if argument not in constexprs]
    signature = {a: types.get(a, f"*{TYPES[dtype]}" if a.endswith("_ptr") else "i32") for a in names}
    strides = tuple(a for a in names if a[1:] in ("_b", "_n", "_h") or a == "padded")
    half = dtype != torch.float32
    return CompileCase(name, kernel, signature, constexprs, strides, num_warps, num_stages, half, architectures)


def _by_config(config_of, shape) -> Iterator[tuple]:
    configs = {arch: config_of(arch, *shape) for arch in ARCHITECTURES}
    for config in dict.fromkeys(configs.values()):
        yield config, tuple(arch for arch in ARCHITECTURES if configs[arch] == config)
