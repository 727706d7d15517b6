"""Asynchronous copies from global to shared memory (cp.async). Part of cta.CTA."""

import numpy as np

from .floats import u4
from .memory import Fault


class Copies:
    def start_copies(self):
        self.copies: list[tuple] = []  # not committed yet
        self.groups: list[list[tuple]] = []  # committed, and not waited for

    def async_copy(self, dst, src, size, source_size, mask):
        lanes = self.everyone if mask is None else np.flatnonzero(mask)
        if not len(lanes):
            return
        to, frm = dst[lanes], src[lanes]
        real = np.full(self.n, size, u4) if source_size is None else np.broadcast_to(source_size, self.n)
        real = real[lanes]
        if ((real != 0) & (real != size)).any():
            raise Fault(f"{self.clock.where}: a copy of part of {size} bytes")
        data = np.zeros((len(lanes), size), np.uint8)
        reads = np.flatnonzero(real)
        if len(reads):
            values = self.G.load(frm[reads], lanes[reads], 4, size // 4)
            data[reads] = np.ascontiguousarray(values.T).view(np.uint8)
        # Nobody may have it in hand: checked as a write now, and until it is waited for
        self.S.check(to, lanes, size, True)
        idx = self.S._granules(to, size)
        self.S.pending[idx] += 1
        self.copies.append((to, lanes, size, data, idx))

    def async_commit(self, mask):
        self.all_or_nothing(mask, "cp.async.commit_group")
        self.groups.append(self.copies)
        self.copies = []

    def async_wait(self, n, mask):
        self.all_or_nothing(mask, "cp.async.wait_group")
        done, self.groups = self.groups[: len(self.groups) - n], self.groups[max(0, len(self.groups) - n) :]
        for copies in done:
            for to, lanes, size, data, idx in copies:
                self.S.pending[idx] -= 1
                first = to - self.S.base
                self.S.data[first[:, None] + np.arange(size)] = data
                if self.S.track:  # written by these threads, now
                    repeat = len(idx) // len(to)
                    self.S.writer[idx] = np.repeat(self.clock.epoch * 64 + self.clock.warps[lanes], repeat)
