"""One thread block (CTA): its registers' width, shared memory, parameters, loads and stores."""

import numpy as np

from .copies import Copies
from .floats import i8, u4
from .memory import UINT, Clock, Fault, Region
from .operands import Unsupported
from .tensor_memory import TensorMemory
from .warps import Warps
from .wgmma import Wgmma

SHARED_BASE = 1024
ATOMICS = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda old, new: new,
    "cas": lambda old, expected, new: new if old == expected else old,
}


class CTA(Warps, Copies, Wgmma, TensorMemory):
    def __init__(self, threads, ctaid, nctaid, params, memory, shared_bytes, clock: Clock, granule):
        self.n, self.warps = threads, threads // 32
        self.G, self.clock = memory, clock
        self.S = Region("shared memory", SHARED_BASE, shared_bytes, clock, granule=granule, shared=True)
        self.params = params  # bytes of the constant bank
        # Special registers.
        self.tid = np.arange(threads, dtype=u4)
        self.lane, self.warp = self.tid & u4(31), self.tid >> u4(5)
        self.zero = np.zeros(threads, u4)
        self.ctaid, self.nctaid = ([self.full(u4(c)) for c in x] for x in (ctaid, nctaid))
        self.ntid, self.smem = self.full(u4(threads)), self.full(u4(SHARED_BASE))
        self.everyone = np.arange(threads)
        clock.warps = (self.everyone // 32).astype(np.int32)
        self.start_copies()
        self.start_wgmma()
        self.start_tensor_memory()

    def full(self, value):
        return np.full(self.n, value) if np.ndim(value) == 0 else value

    def param(self, address, t, offset):
        """Parameters lie in a constant bank of their own."""
        size, a = np.dtype(t).itemsize, np.asarray(address).astype(i8) + offset
        if a.ndim == 0:
            return np.full(self.n, self.params[a : a + size].view(t)[0])
        return np.ascontiguousarray(self.params[a[:, None] + np.arange(size)]).view(t)[:, 0]

    def unsupported(self, text):
        raise Unsupported(text)

    def converged(self, mask):
        """The warps of a warp-wide instruction; (warps,) bool. Fault where a warp is not together."""
        if mask is None:
            return np.ones(self.warps, bool)
        m = mask.reshape(self.warps, 32)
        if (m.any(1) != m.all(1)).any():
            raise Fault(f"{self.clock.where}: a warp-wide instruction without all threads of the warp")
        return m[:, 0]

    def all_or_nothing(self, mask, what):
        if mask is not None and not mask.all():
            raise Unsupported(f"{what} by some threads only")

    def barrier(self):
        self.clock.epoch += 1

    def load(self, where, a, size, n, mask):
        if mask is None:
            return where.load(a, self.everyone, size, n)
        lanes = np.flatnonzero(mask)
        if not len(lanes):
            return None
        values = where.load(a[lanes], lanes, size, n)
        out = np.zeros((n, self.n), UINT[size])
        out[:, lanes] = values
        return out

    def store(self, where, a, size, values, mask):
        values = [np.broadcast_to(v, self.n) for v in values]
        if mask is None:
            return where.store(a, self.everyone, size, values)
        lanes = np.flatnonzero(mask)
        if len(lanes):
            where.store(a[lanes], lanes, size, [v[lanes] for v in values])

    def atomic(self, where, a, operation, mask, *values):
        """One thread after the other."""
        lanes = self.everyone if mask is None else np.flatnonzero(mask)
        if not len(lanes):
            return None
        values = [np.broadcast_to(v, self.n) for v in values]
        size = values[0].dtype.itemsize
        out = np.zeros(self.n, values[0].dtype)
        regions = [(where, slice(None))] if isinstance(where, Region) else where.split(a[lanes], "atomic on")
        for region, which in regions:
            mine = lanes[which]
            track, region.track = region.track, False
            region.check(a[mine], mine, size, True)
            region.track = track
            view = region.views[size].view(values[0].dtype)
            for t in mine:
                i = (int(a[t]) - region.base) // size
                out[t] = view[i]
                view[i] = ATOMICS[operation](view[i], *(v[t] for v in values))
        return out
