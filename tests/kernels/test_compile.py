"""Every Triton kernel compiles for the three targets; on sm_90 none spills, and attention multiplies with wgmma."""

import pytest

from fastdeit.kernels.backend import INTERPRETED

if INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from fastdeit.kernels.compile_case import ARCHITECTURES, all_cases, compile_case, problems

CASES = list(all_cases())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name.replace(" ", "_") for _, case in CASES])
def test_compiles(index, arch):
    _, case = CASES[index]
    resources = compile_case(case, arch)
    assert not problems(case, resources)
    assert resources.registers <= 255 and resources.instructions > 0
