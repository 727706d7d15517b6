"""Memory of the emulated GPU: byte regions with bounds, alignment, initialisation and race checks.

A Region tracks, per granule of bytes, who wrote and who read it last, as codes `epoch * 64 + warp`. A new epoch starts
at every CTA-wide barrier; two warps that touch a granule in one epoch, one of them writing, race.
"""

import ctypes

import numpy as np

POISON16 = 0x7FA5  # a NaN in bf16, fp16, and (twice) in fp32: what nobody wrote
POISON = {1: None, 2: np.uint16(POISON16), 4: np.uint32(0x7FA57FA5), 8: np.uint64(0x7FA57FA57FA57FA5)}
UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SEVERAL = 63


class Fault(AssertionError):
    """What compute-sanitizer would report, or undefined behaviour."""


class Clock:
    """Counts epochs, one per CTA-wide barrier, over all CTAs of a launch."""

    def __init__(self):
        self.epoch = self.first = 1  # the first of this CTA
        self.warps: np.ndarray | None = None  # of each thread
        self.where = "?"  # the instruction executed now
        self.notes: set[str] = set()

    def new_cta(self):
        self.epoch += 1
        self.first = self.epoch


class Region:
    def __init__(self, name, base, size, clock, data=None, granule=2, valid=None, shared=False):
        self.name, self.base, self.size, self.clock, self.shared = name, base, size, clock, shared
        padded = (size + 15) // 16 * 16
        self.data = np.empty(padded, np.uint8) if data is None else data
        self.granule = granule
        n = padded // granule
        self.writer, self.reader = np.zeros(n, np.int32), np.zeros(n, np.int32)
        self.valid = valid  # bytes that an argument has: None where all
        self.pending = None  # granules that an asynchronous copy will write
        self.async_read = None  # granules that wgmma in flight reads
        self.unfenced = None  # granules written by the generic proxy and not yet fenced for the asynchronous one
        if shared:
            self.pending, self.async_read = np.zeros(n, np.int16), np.zeros(n, np.int16)
            self.unfenced = np.zeros(n, bool)
            self.data.view(np.uint16)[:] = POISON16
        self.views = {s: self.data.view(UINT[s]) for s in UINT}
        self.track, self.marked = True, True  # marked: what nobody wrote can be told from data

    def fault(self, verb, what, addresses=None):
        where = ""
        if addresses is not None and len(addresses):
            offsets = addresses.astype(np.int64) - self.base
            where = f" ({len(offsets)} lanes, bytes {offsets.min()}..{offsets.max()} of {self.size})"
        raise Fault(f"{self.clock.where}: {verb} {self.name}: {what}{where}")

    def _granules(self, a, nbytes):
        g = self.granule
        first = (a - self.base) // g
        n = max(1, nbytes // g)
        return first if n == 1 else (first[:, None] + np.arange(n)).ravel()

    def check(self, a, lanes, nbytes, write, by_async=False):
        """Of accesses of nbytes at addresses a (int64) by the threads `lanes`."""
        verb = "write to" if write else "read of"
        if (a & (nbytes - 1)).any():
            self.fault(verb, f"misaligned for {nbytes} bytes", a)
        outside = (a < self.base) | (a + nbytes > self.base + self.size)
        if outside.any():
            self.fault(verb, "out of bounds", a[outside])
        if not self.track:
            return
        if self.valid is not None:
            step = min(nbytes, 8)
            ok = self.valid.view(UINT[step])
            full = UINT[step](int.from_bytes(b"\x01" * step, "little"))
            first = (a - self.base) // step
            bad = np.zeros(len(a), bool)
            for i in range(nbytes // step):
                bad |= ok[first + i] != full
            if bad.any():
                self.fault(verb, "in no argument's elements", a[bad])
        idx = self._granules(a, nbytes)
        repeat = len(idx) // len(a)
        warps = self.clock.warps[lanes]
        if repeat > 1:
            warps = np.repeat(warps, repeat)
        epoch, code = self.clock.epoch, None
        code = np.int32(epoch * 64) + warps
        w = self.writer[idx]
        conflict = ((w >> 6) == epoch) & (w != code)
        if conflict.any():
            i = int(np.flatnonzero(conflict)[0]) // repeat
            self.fault(
                verb,
                f"race: warp {w[conflict][0] & 63} wrote it since the last barrier, warp {warps[conflict][0]} "
                f"{'writes' if write else 'reads'} it",
                a[i : i + 1],
            )
        if not self.shared and self.clock.first > 1 and ((w > 0) & ((w >> 6) < self.clock.first)).any():
            self.fault(verb, "another CTA of this launch wrote it", a)
        if self.shared:
            if self.pending[idx].any():
                self.fault(verb, "an asynchronous copy into it has not been waited for", a)
            if not write and (w == 0).any():
                self.fault(verb, "nobody wrote it", a)
        if write:
            r = self.reader[idx]
            conflict = ((r >> 6) == epoch) & (r != code)
            if conflict.any():
                i = int(np.flatnonzero(conflict)[0]) // repeat
                self.fault(
                    verb,
                    f"race: warp {r[conflict][0] & 63} (63: several) read it since the last barrier, warp "
                    f"{warps[conflict][0]} writes it",
                    a[i : i + 1],
                )
            if not self.shared and ((r > 0) & ((r >> 6) < self.clock.first)).any():
                self.fault(verb, "another CTA of this launch read it", a)
            self.writer[idx] = code
            if self.shared:
                if self.async_read[idx].any():
                    self.fault(verb, "a wgmma in flight reads it", a)
                self.unfenced[idx] = True
        else:
            r = self.reader[idx]
            several = ((r >> 6) == epoch) & (r != code)
            self.reader[idx] = code
            again = self.reader[idx] != code  # two warps in this very instruction
            several |= again
            if several.any():
                self.reader[idx[several]] = epoch * 64 + SEVERAL

    def load(self, a, lanes, size, n):
        """(n, lanes) numbers of `size` bytes."""
        self.check(a, lanes, size * n, False)
        first = (a - self.base) // size
        view = self.views[size]
        v = view[first][None] if n == 1 else view[first + np.arange(n)[:, None]]
        if self.track and self.marked and not self.shared and POISON[size] is not None and (v == POISON[size]).any():
            self.fault("read of", "memory that nobody wrote", a[(v == POISON[size]).any(0)])
        return v

    def store(self, a, lanes, size, values):
        n = len(values)
        self.check(a, lanes, size * n, True)
        first = (a - self.base) // size
        view = self.views[size]
        for i, v in enumerate(values):
            view[first + i] = v
        for i, v in enumerate(values):
            kept = view[first + i]
            wrong = np.flatnonzero(kept != v)
            if len(wrong):
                self.disagreement(a[wrong] + size * i, lanes[wrong], v[wrong], kept[wrong])

    def disagreement(self, a, lanes, values, kept):
        """Threads that hold one number of Triton's in several copies may differ in its last bit, where LLVM made an FMA
        of a product and the first step of a sum over lanes. One warp's copies: its hardware always keeps the same."""
        if self.track and ((self.writer[(a - self.base) // self.granule] & 63) != self.clock.warps[lanes]).any():
            self.fault("write to", "two warps write different values to one place in one instruction", a)
        if values.dtype == np.uint32:
            x, y = values.view(np.float32), kept.view(np.float32)
            if (np.abs(x - y) <= 1e-5 * np.abs(x) + 1e-6).all():
                self.clock.notes.add(f"{self.clock.where}: copies of a number in one warp differ in the last bits")
                return
        self.fault("write to", "two threads write different values to one place in one instruction", a)


class GlobalMemory:
    """Regions at the real addresses of host tensors."""

    def __init__(self, clock):
        self.clock, self.regions, self.bases = clock, [], np.zeros(0, np.int64)

    def add(self, name, pointer, size, valid=None, granule=2, marked=True):
        padded = (size + 15) // 16 * 16
        data = np.ctypeslib.as_array((ctypes.c_uint8 * padded).from_address(pointer))
        self.regions.append(Region(name, pointer, size, self.clock, data, granule, valid))
        self.regions[-1].marked = marked
        self.regions.sort(key=lambda r: r.base)
        self.bases = np.array([r.base for r in self.regions], np.int64)

    def split(self, a, verb):
        """(region, which of a) for the accesses."""
        if not self.regions:
            raise Fault(f"{self.clock.where}: {verb} global memory, and there is none")
        numbers = np.searchsorted(self.bases, a, "right") - 1
        first = int(numbers[0])
        if (numbers == first).all():
            yield self.regions[max(first, 0)], slice(None)
            return
        for number in np.unique(numbers):
            yield self.regions[max(int(number), 0)], np.flatnonzero(numbers == number)

    def load(self, a, lanes, size, n):
        out = None
        for region, which in self.split(a, "read of"):
            v = region.load(a[which], lanes[which], size, n)
            if isinstance(which, slice):
                return v
            out = np.empty((n, len(a)), UINT[size]) if out is None else out
            out[:, which] = v
        return out

    def store(self, a, lanes, size, values):
        for region, which in self.split(a, "write to"):
            region.store(a[which], lanes[which], size, [v[which] for v in values])
