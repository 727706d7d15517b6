"""Compiles Triton kernels where there is no GPU, and reads what they will cost from the machine code.

compile_cases.py describes every kernel at representative shapes, as
CompileCase("attention_forward N=198 D=64 bf16", kernel, signature={...}, constexprs={...}).
`compile_case(case, arch)` compiles one of them for sm_80, sm_90 or sm_100 and returns its `Resources`;
`problems(case, resources)` says in words what is wrong with them.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
TENSOR_COLUMNS_LIMIT = 512  # of tensor memory; Triton compiles what needs more to a kernel that does nothing
SHARED_BYTES_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of one thread block, opted in


@dataclass(frozen=True)
class CompileCase:
    """One kernel, specialised as a launch would specialise it.

    signature:       type of every argument that is not a constexpr: "*bf16", "*fp32", "*i64", "i32", "fp32", ...
                     (a Python float argument is "fp32" since torch 2.15; "fp64" is how older ones passed it).
    constexprs:      value of every `tl.constexpr` argument.
                     A pointer that is None or an integer that is 1 is a constexpr too: launches make it one.
    multiples_of_16: integer arguments (strides, mostly) whose value is a multiple of 16 at real shapes; pointers are
                     taken to be. Without it loads are not vectorised and the registers say nothing about real launches.
    dots_on_wgmma:   on sm_90 every `tl.dot` must have become wgmma.
    architectures:   those on which a launch would choose these constexprs and warps.
    """

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object]
    multiples_of_16: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 1
    dots_on_wgmma: bool = False
    architectures: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True)
class Resources:
    """What one thread block of a compiled kernel uses. Spills are counted as instructions, not bytes."""

    arch: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    instructions: int
    wgmma: int
    mma: int
    tcgen05: int
    tensor_columns: int  # of tensor memory, on sm_100
    dots_left: int  # on sm_90: dots that did not become wgmma


def compile_case(case: CompileCase, arch: int) -> Resources:
    """Compiles for sm_<arch> and measures. Raises what Triton or ptxas raises when the kernel does not compile."""
    arguments = case.kernel.arg_names
    described = set(case.signature) | set(case.constexprs)
    assert described == set(arguments), f"{case.name}: not described or unknown: {described ^ set(arguments)}"
    types = {a: case.signature.get(a, "constexpr") for a in arguments}
    aligned = [i for i, a in enumerate(arguments) if types[a].startswith("*") or a in case.multiples_of_16]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=case.kernel, signature=types, constexprs=case.constexprs, attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    return _measure(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options), arch)


def problems(case: CompileCase, resources: Resources) -> list[str]:
    """Why this kernel is not done; empty when it is."""
    found = []
    if resources.shared_bytes > SHARED_BYTES_LIMIT[resources.arch]:
        found.append(f"needs {resources.shared_bytes} bytes of shared memory, which sm_{resources.arch} does not have")
    if resources.tensor_columns > TENSOR_COLUMNS_LIMIT:
        found.append(f"needs {resources.tensor_columns} columns of tensor memory; there are {TENSOR_COLUMNS_LIMIT}")
    if resources.arch == 90 and resources.spill_stores + resources.spill_loads:
        found.append(f"spills: {resources.spill_stores} stores, {resources.spill_loads} loads")
    if resources.arch == 90 and case.dots_on_wgmma and (resources.dots_left or not resources.wgmma):
        found.append(f"{resources.dots_left} dots without wgmma ({resources.wgmma} wgmma instructions)")
    return found


def _measure(compiled, arch: int) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = _cuobjdump("-res-usage", cubin), _cuobjdump("-sass", cubin)
    ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
    return Resources(
        arch=arch,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spill_stores=len(re.findall(r"\bSTL\b", sass)),
        spill_loads=len(re.findall(r"\bLDL\b", sass)),
        shared_bytes=compiled.metadata.shared,
        instructions=len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+\S", sass, re.MULTILINE)),
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
        tcgen05=len(re.findall(r"tcgen05\.mma", ptx)),
        dots_left=len(re.findall(r"= tt\.dot(_scaled)? ", ttgir)) if arch == 90 else 0,
    )


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    result = subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr
