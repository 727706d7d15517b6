"""sm_90: wgmma, the matrix products of four warps that run beside the code. Part of cta.CTA."""

import numpy as np

from .floats import bf16, decode, f2, f4, f8, tf32, u4
from .memory import Fault
from .operands import Unsupported


class Wgmma:
    def start_wgmma(self):
        self.products: list[tuple] = []  # not committed yet: accumulators, operand registers, granules read
        self.product_groups: list[list[tuple]] = []  # committed, and not waited for
        self.poisoned: dict[int, np.ndarray] = {}  # what an accumulator's register holds until waited for
        self.values: dict[int, np.ndarray] = {}  # what it will hold

    def proxy_fence(self, mask):
        """Of the warps that execute it: for what they have written, and for what a barrier has shown them."""
        executing = np.unique(self.clock.warps if mask is None else self.clock.warps[mask])
        if len(executing):
            now, warp = self.S.writer >> 6 == self.clock.epoch, self.S.writer & 63
            self.S.unfenced &= now & ~np.isin(warp, executing)

    def wgmma_fence(self, mask):
        self.all_or_nothing(mask, "wgmma.fence")

    def operand(self, descriptors, group, mn, k, trans, t, warps):
        """(mn, k) numbers that a descriptor of wgmma describes, and their granules."""
        d = descriptors.reshape(-1, 128)[group]
        if (d != d[0]).any():
            raise Fault(f"{self.clock.where}: descriptors differ within a warp group")
        d = int(d[0])
        if d >> 49 & 7:
            raise Unsupported("descriptor with a base offset")
        return self.shared_operand(d, d >> 62, mn, k, trans, t, warps, True)

    def shared_operand(self, d, swizzle, mn, k, trans, t, warps, several):
        """CUTLASS's canonical layouts. `warps`: the first and last of those that read, `several` of them."""
        start, lead, stride = ((d >> s & 0x3FFF) << 4 for s in (0, 16, 32))
        atom = {0: 16, 1: 128, 2: 64, 3: 32}[swizzle]  # bytes of a row
        size = 4 if t == "tf32" else 2
        i, j = np.arange(mn)[:, None], np.arange(k)[None, :]
        if trans:
            per = atom // size
            if swizzle == 0:
                offset = i % 8 * size + i // 8 * stride + j % 8 * 16 + j // 8 * lead
            else:
                offset = i % per * size + i // per * lead + j % 8 * atom + j // 8 * stride
        elif swizzle == 0:
            offset = i % 8 * 16 + i // 8 * stride + j * size % 16 + j * size // 16 * lead
        else:
            offset = i % 8 * atom + i // 8 * stride + j * size
        a = start + offset
        if atom > 16:
            a = a ^ ((a >> 7 & (atom // 16 - 1)) << 4)
        S = self.S
        flat = a.ravel()
        if (flat < S.base).any() or (flat + size > S.base + S.size).any():
            S.fault("wgmma read of", "out of bounds", flat)
        idx = (flat - S.base) // S.granule
        if S.track:
            w = S.writer[idx]
            if (w == 0).any():
                S.fault("wgmma read of", "nobody wrote it", flat[w == 0])
            if S.pending[idx].any():
                S.fault("wgmma read of", "an asynchronous copy into it has not been waited for", flat)
            if S.unfenced[idx].any():
                S.fault("wgmma read of", "written without fence.proxy.async since", flat[S.unfenced[idx]])
            same = (w >> 6) == self.clock.epoch
            if (same & (((w & 63) < warps[0]) | ((w & 63) > warps[1]))).any():
                S.fault("wgmma read of", "race: a warp of another group wrote it since the last barrier", flat)
            # four warps read: those that wrote in this epoch must be one warp, else the others did not wait
            if several and same.any():
                S.fault("wgmma read of", "race: one warp wrote it since the last barrier, four read it", flat[same])
            if several:
                S.reader[idx] = self.clock.epoch * 64 + 63
        bits = S.views[size][(flat - S.base) // size].reshape(mn, k)
        if t == "tf32":
            values = tf32(bits)
        else:
            values = bits.view(f2) if t == "f16" else bf16(bits)
        return values.astype(f8), np.unique(idx)

    def wgmma(self, R, shape, t, d, x, x_slots, y, scale, ta, tb, mask):
        self.all_or_nothing(mask, "wgmma")
        n, k = (int(v) for v in shape[4:].split("k"))
        groups = self.warps // 4
        scale = bool(np.all(scale))
        overlap = {s: v for s, v in self.poisoned.items() if s in d}
        if overlap and (len(overlap) != len(d) or not all(overlap[s] is R[s] for s in overlap)) and scale:
            raise Fault(f"{self.clock.where}: an accumulator of a wgmma in flight was touched")
        c = [self.values[s] if s in overlap else R[s] for s in d]
        c = np.stack(c).view(f4).reshape(n // 8, 2, 2, groups, 4, 8, 4)  # n8, half of rows, column, group, warp, g, t
        c = c.transpose(3, 4, 1, 5, 0, 6, 2).reshape(groups, 64, n).astype(f8)
        if not scale:
            c = np.zeros_like(c)
        read, out = [], []
        if isinstance(x, list):
            per = 1 if t == "tf32" else 2
            if any(s in self.poisoned for s in x_slots):
                raise Fault(f"{self.clock.where}: an operand register is the result of a wgmma in flight")
            a = (
                decode(np.stack(x), t)
                .reshape(2, 2, self.warps, 8, 4, per)
                .transpose(2, 1, 3, 0, 4, 5)
                .reshape(groups, 64, k)
            )
        for g in range(groups):
            if isinstance(x, list):
                left = a[g]
            else:
                left, idx = self.operand(x, g, 64, k, ta, t, (4 * g, 4 * g + 3))
                read.append(idx)
            right, idx = self.operand(y, g, n, k, tb, t, (4 * g, 4 * g + 3))
            read.append(idx)
            out.append(c[g] + left @ right.T)
        result = np.stack(out).astype(f4).reshape(groups, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
        result = np.ascontiguousarray(result).reshape(n // 2, self.n).view(u4)
        for idx in read:
            self.S.async_read[idx] += 1
        self.products.append((d, [(s, R[s]) for s in x_slots], read))
        for i, s in enumerate(d):
            R[s] = np.full(self.n, 0x7FC12345, u4)  # NaN until waited for
            self.poisoned[s] = R[s]
            self.values[s] = result[i]

    def wgmma_commit(self, mask):
        self.all_or_nothing(mask, "wgmma.commit_group")
        self.product_groups.append(self.products)
        self.products = []

    def wgmma_wait(self, R, n, mask):
        self.all_or_nothing(mask, "wgmma.wait_group")
        done = self.product_groups[: len(self.product_groups) - n]
        self.product_groups = self.product_groups[max(0, len(self.product_groups) - n) :]
        still = {s for group in [*self.product_groups, self.products] for d, _, _ in group for s in d}
        for group in done:
            for d, operands, read in group:
                for idx in read:
                    self.S.async_read[idx] -= 1
                    if self.S.track:  # other warps have perhaps not waited yet
                        self.S.reader[idx] = self.clock.epoch * 64 + 63
                if any(R[s] is not value for s, value in operands):
                    raise Fault(f"{self.clock.where}: an operand register of a wgmma in flight was overwritten")
                for s in d:
                    if s in self.poisoned and s not in still:
                        if R[s] is not self.poisoned[s]:
                            raise Fault(f"{self.clock.where}: an accumulator of a wgmma in flight was overwritten")
                        R[s] = self.values[s]
                        del self.poisoned[s]
