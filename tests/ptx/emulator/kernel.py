"""Runs a compiled kernel's PTX, CTA after CTA."""

import re

import numpy as np

from .control_flow import BRANCHES, EXITS
from .cta import CTA
from .memory import POISON, Fault, GlobalMemory
from .parse import BYTES, parse
from .translate import Translator


class Kernel:
    def __init__(self, text: str, threads: int, shared_bytes: int):
        self.program = parse(text)
        self.threads, self.shared = threads, max(shared_bytes, 16)
        self.code = Translator(self.program)
        # Bytes of shared memory whose readers and writers are told apart: no more than the smallest access.
        small = re.search(r"(?:ld|st)\.shared\.\w*?b8\b", text)
        self.granule = 1 if small else 2 if re.search(r"(?:ld|st)\.shared\S*\.b16\b", text) else 4
        self.initial = [self._unwritten(kind) for kind in self.program.registers.values()]
        self.barriers = [_is_barrier(block) for block in self.program.blocks]

    def _unwritten(self, kind: str):
        if kind == "pred":
            return np.zeros(self.threads, bool)
        size = int(kind[1:]) // 8
        return np.full(self.threads, int(POISON[8]) % 2 ** (8 * size), f"u{size}")

    def launch(self, grid: tuple[int, ...], arguments: list, memory: GlobalMemory):
        """arguments: numbers and addresses in the order of the parameters."""
        grid = (*grid, 1, 1)[:3]
        params, clock = self._parameters(arguments), memory.clock
        for z, y, x in np.ndindex(*grid[::-1]):
            clock.new_cta()
            cta = CTA(self.threads, (x, y, z), grid, params, memory, self.shared, clock, self.granule)
            with np.errstate(all="ignore"):
                self._run(cta)
            if any(cta.product_groups):
                raise Fault("exit with a wgmma in flight")

    def _parameters(self, arguments: list) -> np.ndarray:
        params = np.zeros(self.code.param_bytes, np.uint8)
        for (name, t), value in zip(self.program.params, arguments, strict=True):
            size = BYTES[t]
            number = np.array(value, f"f{size}") if t[0] == "f" else np.array(int(value) % 2 ** (8 * size), f"u{size}")
            params[self.code.params[name] :][:size] = np.frombuffer(number.tobytes(), np.uint8)
        return params

    def _run(self, cta: CTA):
        """Groups of threads stand before blocks; the group before the first of these runs its block."""
        blocks, order = self.program.blocks, self.program.order
        registers = list(self.initial)
        alive = np.ones(self.threads, bool)
        groups = {0: alive.copy()}

        def arrive(block: int, threads: np.ndarray):
            groups[block] = groups[block] | threads if block in groups else threads

        while groups:
            # A barrier waits for all that are alive.
            ready = [b for b in groups if not self.barriers[b] or np.array_equal(groups[b], alive)]
            if not ready:
                raise Fault("threads wait at different barriers, or at one that others do not reach")
            number = min(ready, key=lambda b: order[b])
            mask, block = groups.pop(number), blocks[number]
            (self.code.full if mask.all() else self.code.masked)[number](cta, registers, mask)
            rest, last = mask, block.last
            if last is not None and last.op in BRANCHES + EXITS:
                taken = mask
                if last.predicate is not None:
                    p = registers[self.code.slots[last.predicate]]
                    taken = mask & (~p if last.negated else p)
                rest = mask & ~taken
                if last.op in EXITS:
                    alive &= ~taken
                elif taken.any():
                    arrive(block.taken, taken)
            if rest.any():
                if block.falls is None:
                    alive &= ~rest
                else:
                    arrive(block.falls, rest)


def _is_barrier(block) -> bool:
    op = block.instructions[0].op if block.instructions else ""
    return op.startswith(("bar", "barrier")) and "warp" not in op
