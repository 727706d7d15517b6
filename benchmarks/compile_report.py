"""Compiles every Triton kernel of the project for sm_80, sm_90 and sm_100, without a GPU, and reports what each uses.

    python -m benchmarks.compile_report                     all kernels
    python -m benchmarks.compile_report attention "D=64"    operation, or part of a case

Without names it updates records/compile/resources.csv. --check exits with 1 when a kernel spills on sm_90 or misses
wgmma there.
"""

import argparse
import csv
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

import triton

from fastdeit.cli import FoldedHelp

from .compile_case import ARCHITECTURES, Resources, compile_case, problems
from .compile_cases import all_cases

RECORD = Path(__file__).parent / "records" / "compile" / "resources.csv"
RESOURCES = [field.name for field in fields(Resources)]
COLUMNS = ["triton", "operation", "case", "warps", "stages", *RESOURCES]


def compile_one(index: int, arch: int) -> tuple[dict, list[str]]:
    """The row of case number `index` and what is wrong with it. By number, because kernels do not pickle."""
    operation, case = list(all_cases())[index]
    row = {"triton": triton.__version__, "operation": operation, "case": case.name}
    row |= {"warps": case.num_warps, "stages": case.num_stages, "arch": arch}
    try:
        resources = compile_case(case, arch)
    except Exception as error:
        return row, [f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"]
    return row | asdict(resources), problems(case, resources)


def print_table(results: list[tuple[dict, list[str]]]):
    width = max(len(row["case"]) for row, _ in results)
    print(f"{'case':{width}}  arch  regs  spill st/ld  shared   instr  wgmma  mma  tcgen05  programs")
    for row, wrong in results:
        line = f"{row['case']:{width}}  sm_{row['arch']:<4}"
        if "registers" in row:
            spills = f"{row['spill_stores']}/{row['spill_loads']}"
            line += f"{row['registers']:>3}  {spills:>11}  {row['shared_bytes']:>6}  {row['instructions']:>6}"
            line += f"  {row['wgmma']:>5}  {row['mma']:>3}  {row['tcgen05']:>7}  {row['programs']:>8}"
        print(line + "".join(f"  !! {problem}" for problem in wrong))


def update_record(results: list[tuple[dict, list[str]]]):
    """Replaces the rows just made (per Triton version) and keeps those of other cases that still exist."""
    new = [{column: str(row.get(column, "")) for column in COLUMNS} for row, _ in results]
    old = list(csv.DictReader(RECORD.open())) if RECORD.exists() else []

    def key(row):
        return row["triton"], row["operation"], row["case"], int(row["arch"])

    replaced = {key(row) for row in new}
    known = {(operation, case.name, arch) for operation, case in all_cases() for arch in case.architectures}
    kept = [row for row in old if key(row) not in replaced and key(row)[1:] in known]
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    with RECORD.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(kept + new, key=key))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FoldedHelp)
    parser.add_argument("names", nargs="*", help="only cases whose operation or name contains one of these")
    parser.add_argument("--check", action="store_true", help="exit 1 when a kernel is not as it must be")
    parser.add_argument("--no-record", action="store_true", help="leave records/compile/resources.csv as it is")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="default: all three")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()

    chosen = [
        (i, case)
        for i, (operation, case) in enumerate(all_cases())
        if not args.names or any(name in (operation, case.name) or name in case.name for name in args.names)
    ]
    if not chosen:
        sys.exit(f"No case matches {args.names}. There are: {[case.name for _, case in all_cases()]}")
    work = [(i, arch) for i, case in chosen for arch in args.arch or ARCHITECTURES if arch in case.architectures]
    with ProcessPoolExecutor(args.workers) as pool:
        results = list(pool.map(compile_one, *zip(*work)))
    print(f"triton {triton.__version__}")
    print_table(results)
    if not args.no_record:
        update_record(results)
    if args.check and any(wrong for _, wrong in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
