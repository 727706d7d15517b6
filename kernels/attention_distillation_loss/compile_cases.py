"""Shapes at which the tests and benchmarks/compile_report.py compile this operation's kernels."""

from collections.abc import Iterator

from ..compile_case import CompileCase
from .triton_impl import forward_kernel, gradient_kernel
from .triton_mean import loss_kernel, mean_gradient_kernel

SCALES = {"student_scale": "fp32", "teacher_scale": "fp32"}


def cases() -> Iterator[CompileCase]:
    yield CompileCase(
        "attention_distillation_loss forward D=64 bf16",
        forward_kernel,
        {"losses_ptr": "*fp32", "student_lse_ptr": "*fp32", "teacher_lse_ptr": "*fp32"}
        | tensors("sq", "sk", "tq", "tk") | SCALES | {"H": "i32", "R": "i32", "M": "i32"},
        DIMS | {"MSE": False, "BLOCK_R": 64, "BLOCK_M": 64, "PRECISION": "ieee"},
        multiples_of_16=strides("sq", "sk", "tq", "tk"), num_stages=2, dots_on_wgmma=True,
    )  # fmt: skip
    yield CompileCase(
        "attention_distillation_loss gradient of keys D=64 bf16",
        gradient_kernel,
        {"dloss_ptr": "*fp32", "grad_ptr": "*bf16", "student_lse_ptr": "*fp32", "teacher_lse_ptr": "*fp32"}
        | tensors("sx", "sy", "tx", "ty") | SCALES | {"coefficient": "fp32", "H": "i32", "X": "i32", "Y": "i32"},
        DIMS | {"OF_KEYS": True, "MSE": False, "BLOCK_X": 64, "BLOCK_Y": 64, "PRECISION": "ieee"},
        multiples_of_16=strides("sx", "sy", "tx", "ty"), num_stages=2, dots_on_wgmma=True,
    )  # fmt: skip
    yield CompileCase(
        "attention_distillation_loss mean loss D=64 bf16",
        loss_kernel,
        {"losses_ptr": "*fp32", "delta_ptr": "*fp32", "student_lse_ptr": "*fp32", "teacher_lse_ptr": "*fp32"}
        | tensors("sq", "sk", "tq", "tk") | SCALES | {"H_S": "i32", "H_T": "i32", "R": "i32", "M": "i32"},
        DIMS | {"WITH_DELTA": True, "BLOCK_R": 64, "BLOCK_M": 64, "PRECISION": "ieee"},
        multiples_of_16=strides("sq", "sk", "tq", "tk"), num_stages=1, dots_on_wgmma=True,
    )  # fmt: skip
    yield CompileCase(
        "attention_distillation_loss mean gradient of keys D=64 bf16",
        mean_gradient_kernel,
        {"dloss_ptr": "*fp32", "grad_ptr": "*fp32", "delta_ptr": "*fp32"}
        | {"student_lse_ptr": "*fp32", "teacher_lse_ptr": "*fp32"}
        | tensors("sx", "sy", "tx", "ty") | SCALES
        | {"coefficient": "fp32", "H_S": "i32", "H_T": "i32", "X": "i32", "Y": "i32"},
        DIMS | {"OF_KEYS": True, "BLOCK_X": 64, "BLOCK_Y": 64, "PRECISION": "ieee"},
        multiples_of_16=strides("sx", "sy", "tx", "ty"), num_stages=1, dots_on_wgmma=True,
    )  # fmt: skip


DIMS = {"DIM_S": 64, "DIM_T": 64, "CHUNK_S": 64, "CHUNK_T": 64}


def strides(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}_{axis}" for name in names for axis in "bnh")


def tensors(*names: str) -> dict[str, str]:
    return {f"{name}_ptr": "*bf16" for name in names} | dict.fromkeys(strides(*names), "i32")
