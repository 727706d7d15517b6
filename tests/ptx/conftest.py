import pytest
import triton

from fastdeit.kernels.backend import INTERPRETED

from .emulator import Unsupported

KNOWN = (3, 9)  # the newest Triton whose instructions were all met
TRITON = tuple(int(n) for n in triton.__version__.split(".")[:2])

if INTERPRETED:  # the interpreter replaces the compiler
    collect_ignore_glob = ["test_*.py"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A newer Triton may use instructions that nobody has written down here yet: those are named and skipped."""
    try:
        return (yield)
    except Unsupported as error:
        if TRITON > KNOWN:
            pytest.skip(f"Triton {triton.__version__} uses what the emulator does not know: {error}")
        raise
