"""The table of a kernel's benchmark: ours beside the peers, each time beside the physical floor, with its charts.

table = KernelTable("norm", arguments, torch.bfloat16, seconds=0.3)
table.measure("bias_gelu", "C=3072 bf16", {"fastdeit": ours, "eager": theirs}, floor_bytes=...)     # prints
table.write()                                             # records/DEVICE/norm.csv, .json, .png and _roofline.png
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import charts
from .record import Headline, Record
from .timing import Timing, compare, measure_ceilings

COLUMNS = (
    "operation", "case", "contender", "us", "us_p10", "us_p90", "floor_us", "floor_share", "times_ours", "peak_mb",
    "graph",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One contender in one case. work: least bytes and FLOP. peak_bytes: what a call allocates beyond its inputs,
    results included; None on the CPU."""

    operation: str
    case: str
    contender: str
    timing: Timing
    floor_us: float
    times_ours: float
    work: tuple[float, float]
    peak_bytes: int | None

    @property
    def floor_share(self) -> float:
        return self.floor_us / self.timing.median

    def cells(self) -> list:
        t = self.timing
        figures = [f"{x:.2f}" for x in (t.median, t.low, t.high, self.floor_us)]
        share, ratio = f"{self.floor_share:.3f}", f"{self.times_ours:.3f}"
        peak = "" if self.peak_bytes is None else f"{self.peak_bytes / 1e6:.2f}"
        return [self.operation, self.case, self.contender, *figures, share, ratio, peak, int(t.graph)]


class KernelTable:
    """seconds: how long each contender is measured in each case."""

    def __init__(self, name: str, arguments: argparse.Namespace, dtype: torch.dtype, seconds: float):
        self.name, self.device, self.quick = name, arguments.device, arguments.quick
        self.seconds = 0 if self.quick else seconds
        self.record, self.rows, self.missing = Record(name, arguments, COLUMNS), [], []
        self.ceilings = measure_ceilings(self.device, dtype, quick=self.quick)
        copied, multiplied = self.ceilings.bandwidth / 1e12, self.ceilings.matmul / 1e12
        self.record.conditions["ceilings"] = {"copy, TB/s": round(copied, 3), "matmul, TFLOP/s": round(multiplied, 1)}
        if not self.quick:
            print(f"ceilings measured: copy {copied:.2f} TB/s, matrix product {multiplied:.0f} TFLOP/s")

    def measure(
        self,
        operation: str,
        case: str,
        calls: dict[str, Callable[[], object]],
        *,
        floor_bytes: float,
        floor_flops: float = 0,
        missing: dict[str, str] | None = None,
        uncaptured: tuple[str, ...] = (),
        headline: bool = False,
    ) -> None:
        """Times the calls, of which the first is ours, in turns; prints and keeps the comparison.

        floor_bytes, floor_flops: what must be moved and multiplied at least. missing: contenders that could not be
        measured, with the reason. headline: whether the README is to show this case.
        """
        timings = compare(calls, device=self.device, seconds=self.seconds, uncaptured=uncaptured)
        work = floor_bytes, floor_flops
        floor, ours = self.ceilings.floor_us(*work), next(iter(timings.values())).median
        peaks = {name: _peak_bytes(call, self.device) for name, call in calls.items()}
        rows = [Row(operation, case, name, t, floor, t.median / ours, work, peaks[name]) for name, t in timings.items()]
        self.rows += rows
        self.missing += [f"{operation}, {case}, {name}: {reason}" for name, reason in (missing or {}).items()]
        self._print(rows, missing or {})
        if headline and len(rows) > 1:
            best = min(rows[1:], key=lambda row: row.timing.median)
            self.record.headlines.append(
                Headline(
                    f"{operation}, {case}", _microseconds(ours), best.contender, _microseconds(best.timing.median),
                    round(best.times_ours, 3), round(rows[0].floor_share, 3),
                )
            )  # fmt: skip

    def _print(self, rows: list[Row], missing: dict[str, str]) -> None:
        first = rows[0]
        print(f"{first.operation}, {first.case}" + ("" if self.quick else f" (floor {first.floor_us:.2f} us)"))
        for row in rows:
            if self.quick:
                print(f"    {row.contender:24s} runs", flush=True)
                continue
            t, star = row.timing, "" if row.timing.graph else " *"
            figures = f"{t.median:10.1f} us   [{t.low:.1f}, {t.high:.1f}]   {row.times_ours:5.2f} x ours"
            peak = "" if row.peak_bytes is None else f"   peak {row.peak_bytes / 1e6:.1f} MB"
            print(
                f"    {row.contender + star:24s} {figures}   {100 * row.floor_share:3.0f} % of the floor{peak}",
                flush=True,
            )
        for contender, reason in missing.items():
            print(f"    {contender:24s}        n/a ({reason})", flush=True)

    def write(self) -> None:
        """Writes the record, if there is to be one. Call it after every case: that much is kept when time runs out."""
        self.record.rows = [row.cells() for row in self.rows]
        if self.missing:
            self.record.conditions["not measured"] = self.missing
        self.record.write()
        if (chart := self.record.path(f"{self.name}.png")) is not None:
            charts.times_ours(self.rows, chart)
            if any(row.work[1] for row in self.rows):
                charts.roofline(self.rows, self.ceilings, self.record.path(f"{self.name}_roofline.png"))


def _peak_bytes(call: Callable[[], object], device: str) -> int | None:
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _microseconds(value: float) -> str:
    return f"{value:,.1f} us" if value < 1000 else f"{value / 1000:,.2f} ms"
