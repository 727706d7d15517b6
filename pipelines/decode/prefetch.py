"""Plans in, decoded batches out, in order, running ahead of their use; bad images are found, reported and replaced.

DALI says only that a batch could not be decoded. Which image it was is found by decoding the batch's images one by one;
those that fail are reported, kept out of all later plans, and the batch is made again with others in their place.
"""

import os
from collections import deque
from typing import Protocol

import numpy as np
from torch import Tensor

from fastdeit.pipelines.augment.crop import whole
from fastdeit.pipelines.augment.plan import EvaluationPlans, Plan, TrainPlans
from fastdeit.pipelines.bad_files import BadFiles, DecodeError
from fastdeit.pipelines.index.inspection import BadHeader, inspect_bytes, refusal

AHEAD = 2  # batches in the making while one is used
ATTEMPTS = 3  # at a batch in which no single image is at fault: a network disk may fail once


class Views(Protocol):
    """What decodes and augments, see cpu.py and gpu.py: collect in the order of submit. It may raise DecodeError."""

    def submit(self, plan: Plan) -> None: ...
    def collect(self, plan: Plan) -> Tensor: ...


class Supply:
    """Not safe between threads: let one thread take.

    plans: what to make
    views: what makes it
    bad_files: where bad images are reported; those it lists from an earlier part of the run are avoided at once
    """

    def __init__(self, plans: TrainPlans | EvaluationPlans, views: Views, bad_files: BadFiles):
        self.plans, self.index, self.views, self.bad_files = plans, plans.index, views, bad_files
        self.in_flight: deque[Plan] = deque()  # submitted, not collected
        self.bad: set[int] = set()
        if bad_files.listed:
            self.bad = {i for i in range(len(self.index)) if self.index.name(i) in bad_files.listed}
        self.single = None

    def abandon(self) -> None:
        """Forget what runs ahead, because the next step taken will not be the one after the last."""
        for plan in self.in_flight:
            try:
                self.views.collect(plan)
            except DecodeError:
                pass  # it was not asked for: should it be, it will fail again and be looked into
        self.in_flight.clear()

    def take(self, step: int) -> tuple[Plan, Tensor]:
        """The plan of a step as it was carried out, and its images (B, size, size, 3) uint8."""
        for ahead in range(step + len(self.in_flight), min(step + 1 + AHEAD, self.plans.steps)):
            self._submit(self.plans[ahead])
        fruitless = 0
        while True:
            plan = self.in_flight.popleft()
            assert plan.step == step, f"expected step {step}, got {plan.step}"
            try:
                return plan, self.views.collect(plan)
            except DecodeError as error:
                fruitless += not self._report_bad_images(plan)
                if fruitless == ATTEMPTS:
                    raise RuntimeError(f"a batch cannot be decoded, though each of its images can: {error}") from error
                later = list(self.in_flight)
                self.abandon()
                for again in (plan, *later):
                    self._submit(again)

    def _submit(self, plan: Plan) -> None:
        plan = self.plans.without(plan, self.bad) if self.bad else plan
        self.views.submit(plan)
        self.in_flight.append(plan)

    def _report_bad_images(self, plan: Plan) -> bool:
        """Whether the plan held any, found now or (the plan having been submitted before that) by another batch."""
        found = False
        for i in np.unique(plan.indices).tolist():
            if i not in self.bad and not self._decodes(i):
                self.bad.add(i)
                self.bad_files.report(self.index.name(i), cause_of_failure(self.index, i))
            found |= i in self.bad
        return found

    def _decodes(self, i: int) -> bool:
        from .graph import window_graph, window_inputs  # DALI, which synthetic images do without

        self.single = self.single or window_graph(self.index, 1, 1)
        indices = np.array([i])
        window = whole(self.index.heights[indices], self.index.widths[indices])
        self.single.submit(window_inputs(self.index, indices, window))
        try:
            self.single.collect()
        except DecodeError:
            return False
        return True


def cause_of_failure(index, i: int) -> str:
    """Why image i cannot be decoded, in words."""
    try:
        encoded = index.encoded(i)
    except OSError as error:
        return f"cannot be read ({os.strerror(error.errno)})" if error.errno else f"cannot be read ({error})"
    try:
        found = inspect_bytes(encoded)[:2]
    except BadHeader as cause:
        return str(cause)
    expected = (int(index.heights[i]), int(index.widths[i]))
    if found != expected:
        return f"has changed: it was {expected[0]} x {expected[1]} when it was indexed, now {found[0]} x {found[1]}"
    if (length := int(index.encoded_bytes[i])) != len(encoded):
        return f"has changed: it was {length:,} bytes when it was indexed, now {len(encoded):,}"
    return refusal(encoded.tobytes())
