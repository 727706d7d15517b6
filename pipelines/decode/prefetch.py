"""Decoding ahead of use: plans in, uint8 pixels out, in the order of the steps.

    in    a Plan for each step (augment/plan.py) and the index that it refers to
    out   (Plan, images): images (B, size, size, 3) uint8 on the device, the plan with bad images replaced

DALI says only that a batch could not be decoded. Which image it was is found by decoding the images of the batch one by
one; those that fail are reported and kept out of all later plans, and the batch is decoded again with others in their
place.
"""

import os
from collections import deque
from typing import Protocol

import numpy as np
from torch import Tensor

from fastdeit.pipelines.augment.crop import full_windows
from fastdeit.pipelines.augment.plan import EvaluationPlans, Plan, TrainPlans
from fastdeit.pipelines.bad_files import BadFiles, DecodeError
from fastdeit.pipelines.index.inspection import BadHeader, inspect_bytes, refusal

PREFETCH = 2  # batches that are decoded while one is used
MAX_ATTEMPTS = 3  # at a batch none of whose images is bad by itself: a network disk may fail once


class Decoder(Protocol):
    """Images (B, size, size, 3) uint8 of plans, collected in the order of submit; CpuDecoder or GpuDecoder.

    collect may raise DecodeError, after which the batch counts as collected.
    """

    def submit(self, plan: Plan) -> None: ...
    def collect(self, plan: Plan) -> Tensor: ...


class Prefetcher:
    """Decodes up to PREFETCH batches ahead. Not thread-safe: one thread calls it.

    plans: what to decode
    bad_files: where bad images are reported; those it already lists (a resumed run) are replaced from the start
    """

    def __init__(self, plans: TrainPlans | EvaluationPlans, decoder: Decoder, bad_files: BadFiles):
        self.plans, self.index, self.decoder, self.bad_files = plans, plans.index, decoder, bad_files
        self.in_flight: deque[Plan] = deque()  # submitted, not collected
        self.bad: set[int] = set()
        if bad_files.listed:
            self.bad = {i for i in range(len(self.index)) if self.index.name(i) in bad_files.listed}
        self.single_decoder = None

    def reset(self) -> None:
        """Discard the batches in flight: the next step asked for is not the one after the last."""
        for plan in self.in_flight:
            try:
                self.decoder.collect(plan)
            except DecodeError:
                pass  # if it is asked for again, it fails again and its bad images are found then
        self.in_flight.clear()

    def get(self, step: int) -> tuple[Plan, Tensor]:
        """The images of a step, and its plan with bad images replaced. Steps come in order, or after a reset().

        Raises RuntimeError for a batch that cannot be decoded although each of its images can, and what
        BadFiles.report and the plans raise.
        """
        for ahead in range(step + len(self.in_flight), min(step + 1 + PREFETCH, self.plans.steps)):
            self._submit(self.plans[ahead])
        failures = 0
        while True:
            plan = self.in_flight.popleft()
            assert plan.step == step, f"expected step {step}, got {plan.step}"
            try:
                return plan, self.decoder.collect(plan)
            except DecodeError as error:
                failures += not self._report_bad_images(plan)
                if failures == MAX_ATTEMPTS:
                    raise RuntimeError(f"a batch cannot be decoded, though each of its images can: {error}") from error
                later = list(self.in_flight)
                self.reset()
                for again in (plan, *later):
                    self._submit(again)

    def _submit(self, plan: Plan) -> None:
        plan = self.plans.without(plan, self.bad) if self.bad else plan
        self.decoder.submit(plan)
        self.in_flight.append(plan)

    def _report_bad_images(self, plan: Plan) -> bool:
        """Whether the plan has bad images: found now, or by another batch after this plan was submitted."""
        found = False
        for i in np.unique(plan.indices).tolist():
            if i not in self.bad and not self._decodes(i):
                self.bad.add(i)
                self.bad_files.report(self.index.name(i), cause_of_failure(self.index, i))
            found |= i in self.bad
        return found

    def _decodes(self, i: int) -> bool:
        from .graph import window_graph, window_inputs  # needs DALI; synthetic images do not

        self.single_decoder = self.single_decoder or window_graph(self.index, 1, 1)
        indices = np.array([i])
        window = full_windows(self.index.heights[indices], self.index.widths[indices])
        self.single_decoder.submit(window_inputs(self.index, indices, window))
        try:
            self.single_decoder.collect()
        except DecodeError:
            return False
        return True


def cause_of_failure(index, i: int) -> str:
    """Why image i cannot be decoded."""
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
