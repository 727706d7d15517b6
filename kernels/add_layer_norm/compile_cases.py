"""Shapes at which the tests and benchmarks/compile_report.py compile this operation's kernels."""

from collections.abc import Iterator

from fastdeit.kernels.compile_case import CompileCase

from .triton_impl import (
    BACKWARD_TILE,
    FORWARD_TILE,
    _tile,
    add_layer_norm_backward_kernel,
    add_layer_norm_forward_kernel,
)

STATISTICS = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
VECTORS = {"weight_ptr": "*fp32", "gamma_ptr": "*fp32", "drop_path_ptr": "*fp32"}


def _case(name: str, kernel, C: int, numbers: int, signature: dict[str, str]) -> CompileCase:
    tile = _tile(C, numbers)
    num_warps = tile.pop("num_warps")
    return CompileCase(f"add_layer_norm {name} C={C} bf16", kernel, signature, {"C": C, **tile}, ("rows",), num_warps)


def cases() -> Iterator[CompileCase]:
    forward = ("x_ptr", "residual_ptr", "normed_ptr", "new_residual_ptr")
    signature = dict.fromkeys(forward, "*bf16") | STATISTICS | VECTORS | {"bias_ptr": "*fp32"}
    signature |= {"rows": "i32", "rows_per_sample": "i32", "eps": "fp32"}
    for C in (384, 768):
        yield _case("forward", add_layer_norm_forward_kernel, C, FORWARD_TILE, signature)

    backward = ("grad_normed_ptr", "grad_residual_ptr", "x_ptr", "new_residual_ptr", "dx_ptr", "d_residual_ptr")
    signature = dict.fromkeys(backward, "*bf16") | STATISTICS | VECTORS | {"partial_ptr": "*fp32"}
    signature |= dict.fromkeys(("rows", "rows_per_program", "rows_per_sample"), "i32")
    for C in (384, 768):
        yield _case("backward", add_layer_norm_backward_kernel, C, BACKWARD_TILE, signature)
