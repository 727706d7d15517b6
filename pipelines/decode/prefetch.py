"""Decoding ahead of use: plans in, uint8 pixels out, in the order of the steps.

    in    a Plan for each step (augment/plan.py) and the index that it refers to
    out   (Plan, images): images (B, height, width, 3) uint8 on the device, the plan with bad images replaced

A thread of its own draws the plans, reads the encoded images and hands them to the decoder: Python, page faults and
disks that would otherwise hold up the thread that launches the training steps.

DALI says only that a batch could not be decoded. Which image it was is found by decoding the images of the batch one by
one; those that fail are reported and kept out of all later plans, and the batch is decoded again with others in their
place.
"""

import os
from collections import deque
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol

import numpy as np
from torch import Tensor

from fastdeit.pipelines.augment.crop import full_windows
from fastdeit.pipelines.augment.plan import EvaluationPlans, Plan, TrainPlans
from fastdeit.pipelines.bad_files import BadFiles, DecodeError
from fastdeit.pipelines.index.inspection import BadHeader, inspect_bytes, refusal

PREFETCH = 2  # batches that are decoded while one is used
FED = PREFETCH + 1  # those and one that has been read: decoding starts only where batches are collected
MAX_ATTEMPTS = 3  # at a batch none of whose images is bad by itself: a network disk may fail once


class Decoder(Protocol):
    """Images (B, height, width, 3) uint8 of plans: CpuDecoder or GpuDecoder.

    A batch is fed, started and collected, each in the order of the plans. One thread feeds, one starts and collects.
    collect may raise DecodeError, after which the batch counts as collected.
    """

    def feed(self, plan: Plan) -> None: ...
    def start(self) -> None: ...
    def collect(self, plan: Plan) -> Tensor: ...


class Prefetcher:
    """Decodes up to PREFETCH batches ahead. Not thread-safe: one thread calls it.

    plans: what to decode
    bad_files: where bad images are reported; those it already lists (a resumed run) are replaced from the start
    feeder: an executor of one thread, made here if None; whatever it raises, get raises
    """

    def __init__(
        self,
        plans: TrainPlans | EvaluationPlans,
        decoder: Decoder,
        bad_files: BadFiles,
        feeder: Executor | None = None,
    ):
        self.plans, self.index, self.decoder, self.bad_files = plans, plans.index, decoder, bad_files
        self.feeder = feeder or ThreadPoolExecutor(1, thread_name_prefix="fastdeit-feeder")
        self.fed: deque[Future[Plan]] = deque()  # asked of the feeder, not started
        self.started: deque[Plan] = deque()  # and not collected
        self.bad: set[int] = set()
        if bad_files.listed:
            self.bad = {i for i in range(len(self.index)) if self.index.name(i) in bad_files.listed}
        self.single_decoder = None

    def reset(self) -> None:
        """Discard the batches in flight: the next step asked for is not the one after the last."""
        while self.fed:
            if self.fed[0].cancel() or self.fed[0].exception():
                self.fed.popleft()  # if it is asked for again, it fails again and is raised then
            else:
                self._start()
        while self.started:
            with suppress(DecodeError):  # likewise
                self.decoder.collect(self.started.popleft())

    def get(self, step: int) -> tuple[Plan, Tensor]:
        """The images of a step, and its plan with bad images replaced. Steps come in order, or after a reset().

        Raises RuntimeError for a batch that cannot be decoded although each of its images can, and what
        BadFiles.report and the plans raise.
        """
        failures = 0
        while True:
            for ahead in range(step + len(self.started) + len(self.fed), min(step + 1 + FED, self.plans.steps)):
                self.fed.append(self.feeder.submit(self._feed, ahead))
            if not self.started:
                self._start()
            while len(self.started) <= PREFETCH and self.fed and self.fed[0].done() and not self.fed[0].exception():
                self._start()
            plan = self.started.popleft()
            assert plan.step == step, f"expected step {step}, got {plan.step}"
            try:
                return plan, self.decoder.collect(plan)
            except DecodeError as error:
                self.reset()  # the feeder is at rest then, and may be told of bad images
                failures += not self._report_bad_images(plan)
                if failures == MAX_ATTEMPTS:
                    raise RuntimeError(f"a batch cannot be decoded, though each of its images can: {error}") from error

    def _feed(self, step: int) -> Plan:
        """In the feeder's thread."""
        plan = self.plans[step]
        if self.bad:
            plan = self.plans.without(plan, self.bad)
        self.decoder.feed(plan)
        return plan

    def _start(self) -> None:
        plan = self.fed.popleft().result()
        self.decoder.start()
        self.started.append(plan)

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
