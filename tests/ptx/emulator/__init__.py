"""Runs the compiled PTX of Triton kernels on the CPU, in NumPy: what a GPU would be given, with its bf16, vectorised
loads, swizzles, asynchronous copies and tensor-core instructions, none of which Triton's interpreter shows.

Triton's JIT binds and specialises the arguments and compiles for the architecture asked for. Instead of a launch, the
PTX is executed, one thread block (CTA) after another, on CPU tensors:

    with emulated(90) as launches:
        out = fastdeit.kernels.attention_qkvpacked(qkv)

A fault names the line of PTX and of the Triton source. These are checked: out of bounds, misaligned or unwritten
memory; races of warps between barriers; shared memory touched while a cp.async, wgmma or tcgen05.mma still uses it;
accumulators touched in flight; barriers that not all threads reach; values that two threads store to one place.

Not modelled: time, registers, the machine code that ptxas makes of the PTX, TMA, clusters, warp specialisation, fp8,
the order of memory between CTAs. One false alarm is known: an update in place by one warp of what other warps' copies
of the tile read and do not use.

The stages: parse and control_flow (text to blocks), translate* and operands (blocks to Python), floats and integers
(arithmetic), memory, cta, warps, copies, wgmma and tensor_memory (the machine), kernel and launch (running it).
"""

from .launch import emulated
from .memory import Fault
from .operands import Unsupported

__all__ = ["Fault", "Unsupported", "emulated"]
