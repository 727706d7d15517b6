"""Shapes at which the tests and benchmarks/compile_report.py compile this operation's kernel."""

from collections.abc import Iterator

from ..compile_case import CompileCase
from .triton_impl import distillation_loss_kernel


def cases() -> Iterator[CompileCase]:
    yield _case("mixed labels, hard C=1000 bf16", 1000, 1024, 4, "labels", "hard_logits")
    yield _case("labels, soft C=32768 bf16", 32768, 4096, 8, "labels", "soft_logits")
    yield _case("labels, stored C=1000 bf16", 1000, 1024, 4, "labels", "soft_stored")


def _case(name: str, classes: int, block: int, num_warps: int, target: str, teacher: str) -> CompileCase:
    stored = teacher == "soft_stored"
    signature = {
        "losses_ptr": "*fp32", "terms_ptr": "*fp32", "dcls_ptr": "*bf16", "ddist_ptr": "*bf16",
        "cls_ptr": "*bf16", "dist_ptr": "*bf16", "target_ptr": "*i64", "second_ptr": "*i64", "lam_ptr": "*fp32",
        "teacher_ptr": "*i64" if stored else "*bf16",
        "batch": "i32", "K": "i32", "class_weight": "fp32", "teacher_weight": "fp32", "tau": "fp32",
        "soft_scale": "fp32", "smoothing": "fp32",
    }  # fmt: skip
    constexprs = {
        "C": classes, "CLS_STRIDE": classes, "DIST_STRIDE": classes, "TARGET_STRIDE": 0,
        "TEACHER_STRIDE": 10 if stored else classes, "PROBS_STRIDE": 10 if stored else 0,
        "TARGET": target, "TEACHER": teacher, "SMOOTHED": True, "TWO_HEADS": True, "WITH_GRAD": True,
        "BLOCK": block, "BLOCK_K": 16 if stored else 1,
    }  # fmt: skip
    if stored:
        signature["probs_ptr"] = "*fp16"
    else:
        constexprs["probs_ptr"] = None
    return CompileCase(
        f"distillation_loss {name}", distillation_loss_kernel, signature, constexprs,
        multiples_of_16=("batch",), num_warps=num_warps,
    )  # fmt: skip
