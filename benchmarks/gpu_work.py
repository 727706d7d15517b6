"""What a GPU does in a step: kernels, the host's launches of them, and the time in which anything runs."""

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

STEPS = 5


@dataclass(frozen=True)
class Work:
    """A step's. A CUDA graph's kernels are many, its launch is one."""

    launches: float
    kernels: float
    busy_us: float

    def idle_share(self, step_us: float) -> float:
        """Of a step that takes so long without the profiler, which slows the host down and not the kernels."""
        return max(0.0, 1 - self.busy_us / step_us)


def work_of(step: Callable[[], object]) -> Work:
    """Profile a few steps. What the profiler leaves behind slows later launches down: do it last."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities):  # the first one pays for the profiler's start
        step()
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        return work_in(json.loads(trace.read_text())["traceEvents"], STEPS)


def work_in(trace: Iterable[dict], steps: int) -> Work:
    """Of the events of a Chrome trace of so many steps; times in microseconds."""
    launches = kernels = 0
    spans = []
    for event in trace:
        kind, name = event.get("cat"), event.get("name", "")
        if kind in ("cuda_runtime", "cuda_driver"):
            launches += "LaunchKernel" in name or "GraphLaunch" in name
        elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels += kind == "kernel"
            spans.append((event["ts"], event["ts"] + event["dur"]))
    busy, end = 0.0, float("-inf")
    for first, last in sorted(spans):  # of several streams, so they may overlap
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return Work(launches / steps, kernels / steps, busy / steps)
