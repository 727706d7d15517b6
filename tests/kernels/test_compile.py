"""Every Triton kernel compiles for the three targets; on sm_90 none spills unless its registers are limited on
purpose, and then little, and attention multiplies with wgmma."""

import pytest

from fastdeit.kernels.backend import INTERPRETED

if INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from benchmarks.compile_case import compile_case, problems
from benchmarks.compile_cases import all_cases

CASES = [(case, arch) for _, case in all_cases() for arch in case.architectures]


@pytest.mark.parametrize("case, arch", CASES, ids=[f"{case.name} sm_{arch}".replace(" ", "_") for case, arch in CASES])
def test_compiles(case, arch):
    resources = compile_case(case, arch)
    assert not problems(case, resources)
    assert resources.registers <= 255 and resources.instructions > 0
