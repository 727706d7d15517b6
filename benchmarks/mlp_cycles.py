"""How long the MLP's kernels take on a Hopper GPU, by the model of sass_cycles, beside separate operators.

    python -m benchmarks.mlp_cycles                    DeiT's widths and the nano model's, into the record
    python -m benchmarks.mlp_cycles --width 192 --all  every candidate of one width, printed only

Microseconds of one block's MLP for 128 images of 198 tokens, on 132 multiprocessors at 1.755 GHz. `separate` is what
separate operators must move at the model's rate of DRAM (matrix products by cuBLAS, Inductor's GELU), as if none of
them took longer; `floor` the same of ours. Ours includes what backward leaves to PyTorch: dW1, dW2 and the sums, at
their bytes. records/compile/mlp_cycles.csv keeps the tiles in use, and of widths without kernels the best candidate.
"""

import argparse
import csv
from pathlib import Path

import triton

from fastdeit.cli import FoldedHelp
from fastdeit.kernels.mlp.api import WIDTHS as SUPPORTED
from fastdeit.kernels.mlp.triton_kernels import Tiles, backward_tiles, forward_tiles

from . import sass_cycles
from .compile_case import compiled, measure
from .compile_cases import mlp_case
from .sass_cycles import Instruction, leaves

ARCH, ROWS, MULTIPROCESSORS, CLOCK = 90, 128 * 198, 132, 1755.0  # cycles a microsecond
WIDTHS = (128, 192, 256, 384)
CANDIDATES = (Tiles(64), Tiles(64, num_stages=1), Tiles(64, 64, num_stages=1), Tiles(128, num_warps=8))
# Bytes by rows and width: what must move in our launch, in PyTorch's after it, and in separate operators.
FORWARD, BACKWARD = (4, 0, 36), (22, 22, 72)
RECORD = Path(__file__).parent / "records" / "compile" / "mlp_cycles.csv"
COLUMNS = (
    "direction", "width", "tiles", "cycles", "microseconds", "floor", "separate", "programs", "registers", "spills",
    "issued", "tensor", "triton",
)  # fmt: skip


def row(direction: str, width: int, tiles: Tiles) -> dict[str, str]:
    """Of the record. cycles: of a program; programs: that a multiprocessor holds."""
    case = mlp_case(direction, width, tiles)
    made = compiled(case, ARCH)
    resources = measure(made, ARCH, tiles.num_warps)
    code = sass_cycles.instructions(made.asm["cubin"])
    (loop,) = sass_cycles.loops(code)

    def memory(instruction: Instruction, visit: int, program: int) -> str:
        """Rows come from DRAM and go there, weights and biases come from L2."""
        rows = instruction.kind == "LDG" and "128" in instruction.name and instruction.pc < loop[0]
        return "dram" if rows or instruction.kind == "STG" else "l2"

    found = sass_cycles.estimate(
        code, warps=tiles.num_warps, resident=resources.programs, memory=memory, waves=4,
        trips={leaves(code, loop): 4 * width // tiles.hidden - 1},
    )  # fmt: skip
    ours, after, separate = FORWARD if direction == "forward" else BACKWARD
    microseconds = found.cycles * -(-ROWS // tiles.rows) / MULTIPROCESSORS / CLOCK + at_rate(after, width)
    name = f"{tiles.rows} x {tiles.hidden} w{tiles.num_warps} s{tiles.num_stages}"
    values = (
        direction, width, name + (f" r{tiles.maxnreg}" if tiles.maxnreg else ""), round(found.cycles),
        f"{microseconds:.1f}", f"{at_rate(ours + after, width):.1f}", f"{at_rate(separate, width):.1f}",
        resources.programs, resources.registers, resources.spill_stores + resources.spill_loads,
        f"{found.issued:.2f}", f"{found.tensor:.2f}", triton.__version__,
    )  # fmt: skip
    return dict(zip(COLUMNS, map(str, values), strict=True))


def at_rate(factor: int, width: int) -> float:
    """Microseconds for `factor` bytes of each row and column."""
    return factor * ROWS * width / sass_cycles.DRAM_BYTES / MULTIPROCESSORS / CLOCK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FoldedHelp)
    parser.add_argument("--width", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--all", action="store_true", help="every candidate, printed only")
    arguments = parser.parse_args()
    best = []
    for width in arguments.width:
        for direction, tiles_of in (("forward", forward_tiles), ("backward", backward_tiles)):
            own, found = tiles_of(ARCH), []
            for tiles in (own,) if width in SUPPORTED and not arguments.all else dict.fromkeys((own, *CANDIDATES)):
                try:
                    found.append(row(direction, width, tiles))
                except Exception as error:
                    print(f"{direction} {width} {tiles}: does not compile: {type(error).__name__}")
            best.append(min(found, key=lambda one: float(one["microseconds"])))
            for one in found if arguments.all else best[-1:]:
                print(", ".join(f"{key} {value}" for key, value in one.items()), flush=True)
    if not arguments.all and tuple(arguments.width) == WIDTHS:
        with RECORD.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(best)


if __name__ == "__main__":
    main()
