"""How long calls take, in turns, so that clocks and neighbours disturb all of them alike."""

import statistics
import time
from collections.abc import Callable

import torch

SECONDS = 0.3  # of calls that count, for each contender
AT_LEAST, AT_MOST = 5, 100  # rounds
HOPELESS = 2.0  # times the fastest median: takes no further turn after LOOK rounds
LOOK = 3
LONG = 0.05  # seconds
QUEUED = 3  # calls in a row on a GPU

Call = Callable[[], object]


def in_turns(calls: dict[str, Call], device: torch.device, *, cold: bool = False) -> dict[str, float | Exception]:
    """The median milliseconds of a call of each, or what it raised. All have been called before.

    cold: on a GPU each call finds its L2 cache full of other data, as in a network whose layers outgrow it.
    """
    sample = _Events(device, cold) if device.type == "cuda" else _clock
    samples: dict[str, list[float]] = {name: [] for name in calls}
    raised: dict[str, float | Exception] = {}
    turns, spent, rounds = list(calls), 0.0, 0
    while turns and rounds < AT_MOST and (rounds < AT_LEAST or spent < SECONDS * len(turns)):
        for name in turns[rounds % len(turns) :] + turns[: rounds % len(turns)]:  # no one always follows the same one
            try:
                times = sample(calls[name])
            except Exception as error:
                raised[name] = error.with_traceback(None)
                continue
            samples[name] += times
            spent += sum(times) / 1000
        rounds += 1
        medians = {name: statistics.median(samples[name]) for name in turns if name not in raised}
        limit = HOPELESS * min(medians.values(), default=0.0) if rounds >= LOOK else float("inf")
        turns = [name for name in medians if medians[name] <= limit]
    return {name: raised[name] if name in raised else statistics.median(samples[name]) for name in calls}


def _clock(call: Call) -> list[float]:
    for _ in range(2):  # the first is not counted: with it, data and threads come back; unless it is too long to care
        start = time.perf_counter()
        call()
        if (seconds := time.perf_counter() - start) > LONG:
            break
    return [1000 * seconds]


class _Events:
    """Milliseconds between events on the GPU. It is kept busy for as long as the host takes to queue the calls, so that
    they are timed and not the launches, which in a step are made ahead."""

    def __init__(self, device: torch.device, cold: bool):
        properties = torch.cuda.get_device_properties(device)
        self.device = device
        self.other = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device=device) if cold else None
        self.cycles_per_second = 1000 * getattr(properties, "clock_rate", 2_000_000)  # kHz

    def __call__(self, call: Call) -> list[float]:
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        torch.cuda._sleep(int(self.cycles_per_second * host * (QUEUED + 1)))
        events = []
        for _ in range(QUEUED):
            if self.other is not None:
                self.other.zero_()
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            call()
            after.record()
            events.append((before, after))
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) for before, after in events]
