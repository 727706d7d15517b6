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
SPILLS_FOR_OCCUPANCY = 0.05  # of the instructions, where registers are limited so that more programs run side by side
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
    maxnreg: int | None = None
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
    programs: int  # that a multiprocessor holds at once


def compile_case(case: CompileCase, arch: int) -> Resources:
    """Compiles for sm_<arch> and measures. Raises what Triton or ptxas raises when the kernel does not compile."""
    return measure(compiled(case, arch), arch, case.num_warps)


def compiled(case: CompileCase, arch: int):
    """The kernel that Triton makes of it for sm_<arch>."""
    arguments = case.kernel.arg_names
    described = set(case.signature) | set(case.constexprs)
    assert described == set(arguments), f"{case.name}: not described or unknown: {described ^ set(arguments)}"
    types = {a: case.signature.get(a, "constexpr") for a in arguments}
    aligned = [i for i, a in enumerate(arguments) if types[a].startswith("*") or a in case.multiples_of_16]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=case.kernel, signature=types, constexprs=case.constexprs, attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.maxnreg}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options | {"enable_fp_fusion": True})


def problems(case: CompileCase, resources: Resources) -> list[str]:
    """Why this kernel is not done; empty when it is."""
    found = []
    if resources.shared_bytes > SHARED_BYTES_LIMIT[resources.arch]:
        found.append(f"needs {resources.shared_bytes} bytes of shared memory, which sm_{resources.arch} does not have")
    if resources.tensor_columns > TENSOR_COLUMNS_LIMIT:
        found.append(f"needs {resources.tensor_columns} columns of tensor memory; there are {TENSOR_COLUMNS_LIMIT}")
    allowed = 0 if case.maxnreg is None else resources.instructions * SPILLS_FOR_OCCUPANCY
    if resources.arch == 90 and resources.spill_stores + resources.spill_loads > allowed:
        found.append(f"spills: {resources.spill_stores} stores, {resources.spill_loads} loads")
    if resources.arch == 90 and case.dots_on_wgmma and (resources.dots_left or not resources.wgmma):
        found.append(f"{resources.dots_left} dots without wgmma ({resources.wgmma} wgmma instructions)")
    return found


def measure(compiled, arch: int, num_warps: int) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = _cuobjdump("-res-usage", cubin), _cuobjdump("-sass", cubin)
    ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    return Resources(
        arch=arch,
        registers=registers,
        spill_stores=len(re.findall(r"\bSTL\b", sass)),
        spill_loads=len(re.findall(r"\bLDL\b", sass)),
        shared_bytes=shared,
        instructions=len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+\S", sass, re.MULTILINE)),
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        tensor_columns=columns,
        tcgen05=len(re.findall(r"tcgen05\.mma", ptx)),
        dots_left=len(re.findall(r"= tt\.dot(_scaled)? ", ttgir)) if arch == 90 else 0,
        programs=programs_held(arch, num_warps, registers, shared, columns),
    )


def programs_held(arch: int, num_warps: int, registers: int, shared_bytes: int, tensor_columns: int = 0) -> int:
    """How many programs (CTAs) share a multiprocessor: 65,536 registers, handed out eight a thread; 64 warps; shared
    memory, of which each takes 1 KB more than it asks for; on sm_100 tensor memory."""
    limits = [
        65536 // (num_warps * 32 * (-(-registers // 8) * 8)), 64 // num_warps,
        (SHARED_BYTES_LIMIT[arch] + 1024) // (shared_bytes + 1024),
    ]  # fmt: skip
    return min(limits + ([TENSOR_COLUMNS_LIMIT // tensor_columns] if tensor_columns else []))


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    result = subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr
