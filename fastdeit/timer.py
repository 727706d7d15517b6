"""Where the time of a training step goes, phase by phase, at the price of a time stamp a phase."""

import time

import torch


class PhaseTimer:
    """`enter(phase)` ends the phase before; `stop()` ends the last one; `read()` gives the seconds of each.

    On the CPU the stamps are the clock's. On CUDA they are events in the current stream, so a phase is the time the GPU
    spent in it, idle or busy: loading a batch costs nothing for as long as the GPU still has work queued.
    """

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.stamps: list[tuple[str | None, object]] = []  # None: between two phases
        self.spare_events: list[torch.cuda.Event] = []

    def enter(self, phase: str | None) -> None:
        self.stamps.append((phase, self._stamp()))

    def stop(self) -> None:
        self.enter(None)

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last call. On CUDA only after the host has waited for the device anyway: the
        events are then in the past, and reading them waits for nothing."""
        seconds: dict[str, float] = {}
        for (phase, start), (_, end) in zip(self.stamps, self.stamps[1:]):
            if phase is not None:
                seconds[phase] = seconds.get(phase, 0.0) + self._between(start, end)
        if self.on_cuda:
            self.spare_events += [event for _, event in self.stamps]
        self.stamps = []
        return seconds

    def _stamp(self):
        if not self.on_cuda:
            return time.perf_counter()
        event = self.spare_events.pop() if self.spare_events else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start, end) -> float:
        return start.elapsed_time(end) / 1000 if self.on_cuda else end - start
