"""How many cycles of a Hopper multiprocessor the attention kernels take for one head, by the model of sass_cycles.

    python -m benchmarks.attention_cycles                           the table's tiles at DeiT's lengths, into the record
    python -m benchmarks.attention_cycles --tokens 198 --all        every candidate of one length, printed only

The floor is that of the bytes which must move, at the bandwidth the model has. Compiling and simulating takes a few
seconds a kernel. records/compile/attention_cycles.csv keeps a row for each --label, so that versions can be compared.
"""

import argparse
import csv
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from fastdeit.cli import FoldedHelp
from fastdeit.kernels.attention import tiles
from fastdeit.kernels.attention.configs import FULL_GPU, BackwardConfig, ForwardConfig

from . import sass_cycles
from .compile_case import CompileCase, compiled, measure
from .compile_cases import backward_cases, forward_case
from .sass_cycles import Instruction, leaves

ARCH = 90
TOKENS, HEAD_DIMS = (50, 197, 198, 257, 577, 578, 1025), (64, 32)
RECORD = Path(__file__).parent / "records" / "compile" / "attention_cycles.csv"
COLUMNS = (
    "direction", "tokens", "head_dim", "label", "tiles", "cycles", "floor", "programs", "registers", "spills", "issued",
    "tensor", "triton",
)  # fmt: skip


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


def _kernel(case: CompileCase, plan, programs: int, useful: float, waves: int = 6) -> Cycles:
    made = compiled(case, ARCH)
    resources = measure(made, ARCH, case.num_warps)
    code = sass_cycles.instructions(made.asm["cubin"])
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


def row(label: str, direction: str, tokens: int, head_dim: int, config: ForwardConfig | BackwardConfig) -> dict:
    """Of the record. programs, registers: of each kernel, joined by +."""
    if isinstance(config, ForwardConfig):
        cycles, tensors = forward_cycles(tokens, head_dim, config), 4
    else:
        cycles, tensors = backward_cycles(tokens, head_dim, config), 8
    floor = round(tensors * tokens * head_dim * 2 / sass_cycles.DRAM_BYTES)
    values = (
        direction, tokens, head_dim, label, config.name, cycles.head, floor, "+".join(map(str, cycles.programs)),
        "+".join(map(str, cycles.registers)), cycles.spills, f"{cycles.issued:.2f}", f"{cycles.tensor:.2f}",
        triton.__version__,
    )  # fmt: skip
    return dict(zip(COLUMNS, map(str, values), strict=True))


def update_record(made: list[dict]) -> None:
    old = list(csv.DictReader(RECORD.open())) if RECORD.exists() else []
    rows = {tuple(one[key] for key in COLUMNS[:4]): one for one in (*old, *made)}
    with RECORD.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        order = sorted(
            rows.values(), key=lambda one: (-int(one["head_dim"]), one["direction"], int(one["tokens"]), one["label"])
        )
        writer.writerows(order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FoldedHelp)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--head-dim", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--all", action="store_true", help="every candidate, printed only")
    parser.add_argument("--label", default="now", help="of the rows in the record")
    arguments = parser.parse_args()
    for head_dim in arguments.head_dim:
        for tokens in arguments.tokens:
            shape = tiles.Shape(ARCH, tokens, tokens, head_dim, torch.bfloat16)
            for direction, candidates in (
                ("forward", tiles.forward_candidates(shape)),
                ("backward", tiles.backward_candidates(shape, FULL_GPU)),
            ):
                for config in list(candidates.values())[: None if arguments.all else 1]:
                    made = row(arguments.label, direction, tokens, head_dim, config)
                    print(", ".join(f"{key} {value}" for key, value in made.items() if key != "label"), flush=True)
                    if not arguments.all:
                        update_record([made])


if __name__ == "__main__":
    main()
