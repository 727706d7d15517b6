"""Times contenders side by side in one process, and keeps a record beside the floor.

    table = Table("pointwise", device)
    timings = compare({"fastdeit": ours, "eager": theirs}, device=device)
    table.add("bias_gelu", "C=3072 bf16", timings, floor_bytes=...)      # prints
    table.write()                                                        # records/<device>/pointwise.csv, .png, .json

On a GPU a contender is captured in a CUDA graph, so that its kernels are timed and not the launches; one that cannot be
captured (draws random numbers on the host, synchronises) is called as it is, launches and all, and marked with a star.
Before every call the cache is flushed, which also gives the host time to be ahead of the device. Contenders take turns,
so that clocks and neighbours disturb all of them alike; the figure is the median, with the 10th and 90th percentile.
"""

import csv
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RECORDS = Path(__file__).parent / "records"
PACKAGES = ("torch", "triton", "timm", "xformers", "transformers", "liger-kernel")
# Datasheet bytes a second, by a part of the device's name.
BANDWIDTH = {
    "H200": 4.8e12,
    "H100 PCIe": 2.0e12,
    "H100": 3.35e12,
    "A100-SXM4-80GB": 2.04e12,
    "A100": 1.555e12,
    "B200": 8e12,
}


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call, and whether a CUDA graph was timed (always true on the CPU)."""

    median: float
    low: float
    high: float
    graph: bool = True


def compare(
    contenders: dict[str, Callable[[], object]],
    *,
    device: str = "cuda",
    seconds: float = 0.5,
    uncaptured: Iterable[str] = (),
) -> dict[str, Timing]:
    """Times the contenders in turns, for about so many seconds each. Those in `uncaptured` are not put into a graph."""
    gpu = torch.device(device).type == "cuda"
    captured = {name: _capture(call) if gpu and name not in uncaptured else None for name, call in contenders.items()}
    calls = {name: captured[name] or call for name, call in contenders.items()}
    sample = _GpuTimer() if gpu else _cpu_sample
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    deadline = time.monotonic() + seconds * len(calls)
    while time.monotonic() < deadline or min(map(len, samples.values())) < 5:
        for name, call in calls.items():
            samples[name].append(sample(call))
    quantiles = torch.tensor([0.5, 0.1, 0.9])
    return {
        name: Timing(*torch.tensor(times).quantile(quantiles).tolist(), graph=not gpu or captured[name] is not None)
        for name, times in samples.items()
    }


def _cpu_sample(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - started)


class _GpuTimer:
    CALLS = 8  # of one contender in a row

    def __init__(self):
        cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flushed = torch.empty(4 * max(cache_bytes, 2**25), dtype=torch.uint8, device="cuda")

    def __call__(self, call: Callable[[], object]) -> float:
        """The median of a few calls, each from a cold cache."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.CALLS)]
        for before, after in events:
            self.flushed.zero_()
            before.record()
            call()
            after.record()
        torch.cuda.synchronize()
        return sorted(1e3 * before.elapsed_time(after) for before, after in events)[self.CALLS // 2]


def _capture(call: Callable[[], object]) -> Callable[[], None] | None:
    """A replay of the call's kernels; None when it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):  # a backward pass runs where its forward ran: in the warm-up
            call()
    except Exception as error:
        print(f"not captured, called as it is: {str(error).splitlines()[0]}", file=sys.stderr)
        torch.cuda.synchronize()
        return None
    return graph.replay


class Table:
    """Rows of (operation, case, contender) with the time, its spread, the floor and the ratio to our side."""

    COLUMNS = ("operation", "case", "contender", "us", "us_p10", "us_p90", "floor_us", "times_ours", "graph")

    def __init__(self, name: str, device: str, record: bool = True):
        self.name, self.device, self.rows, self.missing = name, device, [], []
        self.folder = RECORDS / device_name(device) if record else None

    def add(
        self,
        operation: str,
        case: str,
        timings: dict[str, Timing],
        floor_bytes: float = 0,
        floor_us: float = 0,
        missing: dict[str, str] | None = None,
    ) -> None:
        """Prints and keeps one comparison, whose first contender is ours.

        The floor is floor_us, or floor_bytes (what must move) over the bandwidth of a known device. missing: contenders
        that could not be measured, with the reason.
        """
        if floor_bytes and bandwidth(self.device):
            floor_us = max(floor_us, 1e6 * floor_bytes / bandwidth(self.device))
        floor = f"{floor_us:.2f}" if floor_us else ""
        ours = next(iter(timings.values())).median
        print(f"{operation}, {case}" + (f" (floor {floor} us)" if floor else ""))
        for contender, t in timings.items():
            numbers = [f"{x:.2f}" for x in (t.median, t.low, t.high)]
            ratio = f"{t.median / ours:.2f}"
            self.rows.append([operation, case, contender, *numbers, floor, ratio, int(t.graph)])
            star = "" if t.graph else " *"
            print(
                f"    {contender + star:24s} {t.median:10.1f} us   [{t.low:.1f}, {t.high:.1f}]   {ratio} x ours",
                flush=True,
            )
        for contender, reason in (missing or {}).items():
            print(f"    {contender:24s}        n/a ({reason})", flush=True)
            self.missing.append(f"{operation}, {case}, {contender}: {reason}")

    def write(self) -> None:
        """Writes the record, if there is to be one. Call it after every case: that much is kept when time runs out."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / self.name
        with path.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.COLUMNS)
            writer.writerows(self.rows)
        described = surroundings(self.device) | ({"not measured": self.missing} if self.missing else {})
        path.with_suffix(".json").write_text(json.dumps(described, indent=1) + "\n")
        self._draw(path.with_suffix(".png"))

    def _draw(self, path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        cases = list(dict.fromkeys((row[0], row[1]) for row in self.rows))
        names = list(dict.fromkeys(row[2] for row in self.rows))
        figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(self.rows)), layout="constrained")
        for k, name in enumerate(names):
            points = {(row[0], row[1]): float(row[7]) for row in self.rows if row[2] == name}
            axes.barh(
                [cases.index(c) + k / (len(names) + 1) for c in points], points.values(), 0.8 / len(names), label=name
            )
        axes.set_yticks(
            [i + 0.3 for i in range(len(cases))], [f"{operation}, {case}" for operation, case in cases], fontsize=7
        )
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.axvline(1, color="black", linewidth=0.6)
        axes.set_xlabel("time over ours")
        axes.legend(fontsize=7)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def bandwidth(device: str) -> float:
    """Datasheet bytes a second of the device; 0 where unknown."""
    name = "" if device == "cpu" else torch.cuda.get_device_name(device)
    return next((value for part, value in BANDWIDTH.items() if part in name), 0.0)


def device_name(device: str) -> str:
    """The folder of a device's records: "cpu", "nvidia-h200"."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device).replace(" ", "-").lower()


def surroundings(device: str) -> dict:
    """Versions, device, clocks and the command: what a reader needs to trust or repeat a record."""
    described = {
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            continue
    described["threads"] = torch.get_num_threads()
    if device != "cpu":
        query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
        smi = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        described[query] = subprocess.run(smi, capture_output=True, text=True).stdout.strip()
    return described
