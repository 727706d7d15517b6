"""Shapes at which the tests and benchmarks/compile_report.py compile this operation's kernels."""

from collections.abc import Iterator

from fastdeit.kernels.compile_case import CompileCase

from .triton_impl import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    FORWARD_BLOCK,
    bias_gelu_backward_kernel,
    bias_gelu_forward_kernel,
)


def cases() -> Iterator[CompileCase]:
    tensors = {"x_ptr": "*bf16", "bias_ptr": "*bf16"}
    yield CompileCase(
        "bias_gelu forward C=3072 bf16",
        bias_gelu_forward_kernel,
        tensors | {"y_ptr": "*bf16", "numel": "i32"},
        {"C": 3072, "BLOCK": FORWARD_BLOCK},
        ("numel",),
    )
    yield CompileCase(
        "bias_gelu backward C=3072 bf16",
        bias_gelu_backward_kernel,
        tensors
        | {"grad_ptr": "*bf16", "dx_ptr": "*bf16", "partial_ptr": "*fp32", "rows": "i32", "rows_per_program": "i32"},
        {"C": 3072, "BLOCK_R": BLOCK_ROWS, "BLOCK_C": BLOCK_COLUMNS},
        ("rows", "rows_per_program"),
        num_warps=8,
    )
