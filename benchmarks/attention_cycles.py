"""How many cycles of a Hopper multiprocessor the attention kernels take for one head, by the model of sass_cycles.

python -m benchmarks.attention_cycles                       the table's tiles at DeiT's lengths, into the record
python -m benchmarks.attention_cycles --tokens 198 --all    every candidate at one length, best first, printed only
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from fastdeit.kernels.attention.configs import BackwardConfig, ForwardConfig

from . import sass_cycles
from .compile_case import CompileCase, compiled, measure
from .compile_cases import backward_cases, forward_case
from .sass_cycles import Instruction

ARCH = 90


class Cycles(NamedTuple):
    head: int  # of all programs of one head
    programs: tuple[int, ...]  # that a multiprocessor holds, of each kernel
    registers: tuple[int, ...]
    spills: int  # instructions
    issued: float
    tensor: float


def forward_cycles(tokens: int, head_dim: int, config: ForwardConfig) -> Cycles:
    case = forward_case("", tokens, head_dim, torch.bfloat16, config)
    rows = -(-tokens // config.block_m)
    useful = tokens / (rows * config.block_m)
    if config.keys == "resident":

        def plan(code, loops):
            return {leaves(code, loops[0]): rows - 1}, lambda instruction, visit, program: "dram"

        return _sum([_kernel(case, plan, 1, useful)])

    def plan(code, loops):
        first = min(loop[0] for loop in loops) if loops else code[-1].pc
        trips = {leaves(code, loops[0]): max(0, (tokens - 1) // config.block_n - 1)} if loops else {}

        def memory(instruction: Instruction, visit: int, program: int) -> str:
            of_keys = instruction.kind == "LDGSTS" or (instruction.kind == "LDG" and instruction.pc > first)
            return "l2" if of_keys and program % rows else "dram"

        return trips, memory

    return _sum([_kernel(case, plan, rows, useful)])


def backward_cycles(tokens: int, head_dim: int, config: BackwardConfig) -> Cycles:
    cases = list(backward_cases("", tokens, head_dim, torch.bfloat16, config))
    if config.one is not None:
        return _sum([_one_launch(cases[0], tokens, *config.one[:2])])
    found = []
    for case, (block, step) in zip(cases, ((config.kv.keys, config.kv.queries), (config.q.queries, config.q.keys))):
        programs, steps = -(-tokens // block), -(-tokens // step)

        def plan(code, loops, programs=programs, steps=steps):
            def memory(instruction: Instruction, visit: int, program: int) -> str:
                return "l2" if instruction.kind == "LDGSTS" and program % programs else "dram"

            return {leaves(code, loops[0]): steps - 1}, memory

        found.append(_kernel(case, plan, programs, tokens / (programs * block)))
    return _sum(found)


def _one_launch(case: CompileCase, tokens: int, keys: int, queries: int) -> Cycles:
    blocks, steps = -(-tokens // keys), -(-tokens // queries)

    def plan(code, loops):
        inner = next(loop for loop in loops if any(i.kind == "HGMMA" and loop[0] <= i.pc <= loop[1] for i in code))
        statistics = next(loop for loop in loops if loop[1] < inner[0]) if blocks > 1 or len(loops) > 1 else None
        trips = {leaves(code, inner): steps - 1}
        if statistics:
            trips[leaves(code, statistics)] = blocks - 1
        around = [loop for loop in loops if loop[0] < inner[0] and loop[1] > inner[1]]
        trips |= {leaves(code, loop): blocks - 1 for loop in around}
        copies = [i.pc for i in code if i.kind == "LDGSTS" and "128" in i.name]

        def memory(instruction: Instruction, visit: int, program: int) -> str:
            pc, inside = instruction.pc, inner[0] <= instruction.pc <= inner[1]
            block = visit // steps if inside else visit
            if instruction.kind == "LDGSTS":  # queries, and their gradients, which the statistics have read before
                return "dram" if "128" in instruction.name and copies.index(pc) % 2 and block == 0 else "l2"
            if not inside:
                return "l2" if statistics and pc < statistics[1] and instruction.kind == "STG" else "dram"
            if instruction.kind == "LDG":  # the sum of dQ
                return "off" if block == 0 and blocks > 1 else "l2"
            return "dram" if block == blocks - 1 else "l2"

        return trips, memory

    return _kernel(case, plan, 1, tokens / (blocks * keys), waves=6 if blocks * steps < 50 else 3)


def leaves(code: list[Instruction], loop: tuple[int, int]) -> int:
    """The branch that closes a loop, or where that has no condition the last exit inside."""
    first, last = loop
    inside = [i for i in code if first <= i.pc <= last]
    return last if inside[-1].predicate else [i.pc for i in inside if i.kind == "EXIT" and i.predicate][-1]


def _kernel(case: CompileCase, plan, programs: int, useful: float, waves: int = 6) -> Cycles:
    made = compiled(case, ARCH)
    resources = measure(made, ARCH, case.num_warps)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        code = sass_cycles.instructions(cubin)
    trips, memory = plan(code, sass_cycles.loops(code))
    result = sass_cycles.estimate(
        code, warps=case.num_warps, resident=resources.programs, trips=trips, memory=memory, useful=useful,
        waves=waves,
    )  # fmt: skip
    spills = resources.spill_stores + resources.spill_loads
    return Cycles(
        round(result.cycles * programs), (resources.programs,), (resources.registers,), spills, result.issued,
        result.tensor,
    )  # fmt: skip


def _sum(kernels: list[Cycles]) -> Cycles:
    head = sum(k.head for k in kernels)
    return Cycles(
        head, sum((k.programs for k in kernels), ()), sum((k.registers for k in kernels), ()),
        sum(k.spills for k in kernels), sum(k.issued * k.head for k in kernels) / head,
        sum(k.tensor * k.head for k in kernels) / head,
    )  # fmt: skip
