"""How long a run still takes, estimated from the steps and evaluations that this process has seen of it."""

import time
from collections.abc import Callable, Sequence

WARM_UP = 2  # steps that do not count: compilation, the search for the fastest convolutions, first allocations
FIRST = 3  # steps after those that an estimate takes at least
FORWARD = 1 / 3  # of a training step's work: the backward pass is twice the forward pass


class Remaining:
    """steps: of the whole run. evaluated_after: the steps after which it evaluates, ascending. forwards: images that
    pass through a model in an evaluation, over the images of a step; it tells what an evaluation costs until one has
    been timed. work: done after so many steps of the run, in steps at full cost; where steps of smaller images cost
    less."""

    def __init__(
        self,
        steps: int,
        evaluated_after: Sequence[int] = (),
        forwards: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        work: Callable[[int], float] = float,
    ):
        self.steps, self.evaluated_after, self.forwards, self.clock = steps, evaluated_after, forwards, clock
        self.work = work
        self.last: float | None = None
        self.seen = 0
        self.in_steps = 0.0  # seconds, of all steps but the first WARM_UP; saving and waiting for data included
        self.in_evaluation: float | None = None  # seconds of one

    def stepped(self) -> None:
        """A step has been made."""
        now = self.clock()
        self.seen += 1
        if self.seen > WARM_UP and self.last is not None:
            self.in_steps += now - self.last
        self.last = now

    def evaluated(self, seconds: float, *, compiled: bool) -> None:
        """An evaluation has ended, which took so long. compiled: the time of a compilation is in it."""
        if not compiled:
            self.in_evaluation = seconds
        if self.last is not None:
            self.in_steps += max(0.0, self.clock() - self.last - seconds) if self.seen > WARM_UP else 0
        self.last = self.clock()

    @property
    def has_just_begun(self) -> bool:
        """Whether the last step made the first estimate possible."""
        return self.seen == WARM_UP + FIRST

    @property
    def seconds_a_step(self) -> float | None:
        return self.in_steps / (self.seen - WARM_UP) if self.seen >= WARM_UP + FIRST else None

    def seconds(self, step: int) -> float | None:
        """After so many steps of the run; None before an estimate is possible."""
        if self.seconds_a_step is None:
            return None
        timed = self.seen - WARM_UP  # the last ones
        first = max(0, step - timed)
        each = self.in_steps / (self.work(first + timed) - self.work(first))
        evaluations = sum(end > step for end in self.evaluated_after)
        one = self.in_evaluation if self.in_evaluation is not None else FORWARD * self.forwards * each
        return each * (self.work(self.steps) - self.work(step)) + one * evaluations

    def words(self, step: int) -> str:
        """H:MM:SS."""
        seconds = self.seconds(step)
        if seconds is None:
            return "-:--:--"
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
