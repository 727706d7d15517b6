"""Shapes at which the tests and benchmarks/compile_report.py compile this operation's kernel."""

from collections.abc import Iterator

from fastdeit.kernels.compile_case import CompileCase

from .triton_impl import BLOCK, mix_normalize_kernel

DRAWS = {
    "partner_ptr": "*i64",
    "lam_ptr": "*fp32",
    "box_ptr": "*i32",
    "erase_box_ptr": "*i32",
    "erase_seed_ptr": "*i64",
}
SCALARS = {"batch": "i32", "H": "i32"} | {f"{name}_{c}": "fp32" for name in ("shift", "scale") for c in "rgb"}


def cases() -> Iterator[CompileCase]:
    constexprs = {"W": 224, "CHANNELS_LAST": True, "BLOCK": BLOCK}
    images = {"images_ptr": "*u8", "out_ptr": "*bf16"} | SCALARS
    divisible = ("batch", "H")
    yield CompileCase(
        "mix_normalize train 224 bf16 channels_last", mix_normalize_kernel, images | DRAWS, constexprs, divisible
    )
    yield CompileCase(
        "mix_normalize eval 224 bf16 channels_last",
        mix_normalize_kernel,
        images,
        constexprs | dict.fromkeys(DRAWS),
        divisible,
    )
