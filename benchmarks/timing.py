"""Times contenders side by side in one process.

    timings = compare({"fastdeit": ours, "eager": theirs}, device=device)

On a GPU a contender is captured in a CUDA graph, so that its kernels are timed and not the launches; one that cannot be
captured (draws random numbers on the host, synchronises) is called as it is, launches and all, and marked with a star.
Before every call the cache is flushed, which also gives the host time to be ahead of the device. Contenders take turns,
so that clocks and neighbours disturb all of them alike; the figure is the median, with the 10th and 90th percentile.

The floors are measured too, in the same run: what the device copies a second, and what it multiplies.
"""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch


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
    """Times the contenders in turns, for about so many seconds each; 0: one call each, to see that they run. Those in
    `uncaptured` are not put into a graph."""
    gpu = torch.device(device).type == "cuda"
    captured = {name: _capture(call) if gpu and name not in uncaptured else None for name, call in contenders.items()}
    calls = {name: captured[name] or call for name, call in contenders.items()}
    sample = _GpuTimer() if gpu else _cpu_sample
    samples: dict[str, list[float]] = {name: [] for name in calls}
    at_least = 5 if seconds else 1
    if seconds:
        for call in calls.values():
            call()
    deadline = time.monotonic() + seconds * len(calls)
    while time.monotonic() < deadline or min(map(len, samples.values())) < at_least:
        for name, call in calls.items():
            samples[name].append(sample(call))
    quantiles = torch.tensor([0.5, 0.1, 0.9])
    return {
        name: Timing(*torch.tensor(times).quantile(quantiles).tolist(), graph=not gpu or captured[name] is not None)
        for name, times in samples.items()
    }


def compiled(function: Callable, *, quick: bool) -> Callable:
    """The function compiled for the very shapes it meets; in a quick run it is traced and no code generated."""
    return torch.compile(function, fullgraph=True, dynamic=False, backend="eager" if quick else "inductor")


@dataclass(frozen=True)
class Ceilings:
    """What the device can do at best: bytes a second moved by a copy (read and written ones both counted), and FLOP a
    second of a large matrix product."""

    bandwidth: float
    matmul: float

    def floor_us(self, bytes_moved: float, flops: float) -> float:
        """The least time in which so much can be moved and multiplied, both at once."""
        return 1e6 * max(bytes_moved / self.bandwidth, flops / self.matmul)


def measure_ceilings(device: str, dtype: torch.dtype, *, quick: bool = False) -> Ceilings:
    gpu = torch.device(device).type == "cuda"
    size, side = (2**30, 8192) if gpu else (2**27, 1024)
    if quick:
        size, side = 2**16, 64
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: left @ right}
    timings = compare(calls, device=device, seconds=0 if quick else 0.5)
    return Ceilings(1e6 * 2 * size / timings["copy"].median, 1e6 * 2 * side**3 / timings["matmul"].median)


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
