"""Translates basic blocks of PTX into Python functions on NumPy arrays, one element per thread of a CTA.

Registers hold bits: uint16, uint32, uint64 or bool arrays in the list R. X is the CTA. A block is compiled twice: for
all threads, and for those of a mask M.
"""

import numpy as np

from . import floats, integers
from .control_flow import BRANCHES, EXITS
from .operands import NUMPY, Operands, Unsupported
from .parse import Instruction, Program
from .translate_arithmetic import conversion, floating, integral, logical
from .translate_memory import memory, movement
from .translate_warps import synchronization, tensor_core, warp_wide

FAMILIES = (floating, integral, logical, conversion, movement, memory, warp_wide, tensor_core, synchronization)
# Where a fault says where it was.
FAULTY = ("ld.", "st.", "matrix", "cp.async", "wgmma", "atom", "red.", "shfl", "mma", "redux", "mbarrier", "tcgen05")


class Translator(Operands):
    def __init__(self, program: Program):
        super().__init__(program)
        numbers = range(len(program.blocks))
        self.source = "\n".join(self._block(i, masked) for i in numbers for masked in (False, True))
        space = {**vars(floats), **vars(integers), **NUMPY, **self.constants, "where": np.where}
        exec(compile(self.source, f"<{program.name}>", "exec"), space)
        self.full, self.masked = ([space[f"b{i}{suffix}"] for i in numbers] for suffix in ("", "m"))

    def _block(self, number: int, masked: bool) -> str:
        lines = []
        for instruction in self.program.blocks[number].instructions:
            if instruction.op not in BRANCHES + EXITS:
                lines += self._instruction(instruction, masked)
        body = "".join(f"    {line}\n" for line in lines or ["pass"])
        return f"def b{number}{'m' if masked else ''}(X, R, M):\n{body}"

    def _instruction(self, instruction: Instruction, masked: bool) -> list[str]:
        lines = []
        op, operands = instruction.op, instruction.operands
        self.mask = "M" if masked else None
        if any(s in op for s in FAULTY):
            lines.append(f"X.clock.where = {f'PTX line {instruction.line} ({instruction.source}) {op}'!r}")
        if instruction.predicate:
            p = f"{'~' if instruction.negated else ''}R[{self.slots[instruction.predicate]}]"
            lines.append(f"m = {p} & M" if masked else f"m = {p}")
            self.mask = "m"
        try:
            return lines + self._translated(op, operands)
        except (Unsupported, KeyError, IndexError, StopIteration, ValueError, AssertionError, TypeError) as error:
            # Raised only if it is ever executed.
            text = f"{op} {', '.join(operands)[:200]} (line {instruction.line}): {type(error).__name__} {error}"
            return [*lines, f"X.unsupported({text!r})"]

    def _translated(self, op: str, operands: list[str]) -> list[str]:
        part = op.split(".")
        for family in FAMILIES:
            lines = family(self, part, part[-1], operands)
            if lines is not None:
                return lines
        raise Unsupported(op)
