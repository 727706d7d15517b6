"""Warp-wide instructions: shuffles, reductions, votes, ldmatrix, stmatrix and mma.sync. Part of cta.CTA."""

import numpy as np

from .floats import decode, f4, i8, u2, u4, u8


class Warps:
    def shuffle(self, kind, x, b, c, mask):
        self.converged(mask)
        x = np.broadcast_to(x, self.n)
        lane, b, c = self.lane.astype(i8), np.asarray(b).astype(i8) & 31, np.asarray(c).astype(i8)
        segment, clamp = (c >> 8) & 31, c & 31
        top, low = (lane & segment) | (clamp & ~segment), lane & segment
        if kind == "idx":
            j = low | (b & ~segment)
            ok = j <= top
        elif kind == "bfly":
            j = lane ^ b
            ok = j <= top
        elif kind == "up":
            j = lane - b
            ok = j >= top
        else:
            j = lane + b
            ok = j <= top
        j = np.where(ok, j, lane)
        return x[(self.everyone & ~31) + j]

    def redux(self, operation, x, mask, nan):
        self.converged(mask)
        f = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[operation]
        if x.dtype == f4 and not nan:  # the number of the two
            f = {"min": np.fmin, "max": np.fmax}[operation]
        return np.repeat(f.reduce(np.broadcast_to(x, self.n).reshape(-1, 32), axis=1, dtype=x.dtype), 32)

    def ballot(self, p, mask):
        p = p if mask is None else p & mask
        return np.repeat((p.reshape(-1, 32).astype(u8) << np.arange(32, dtype=u8)).sum(1).astype(u4), 32)

    def vote(self, kind, p, mask):
        self.converged(mask)
        p = p.reshape(-1, 32)
        return np.repeat({"any": p.any(1), "all": p.all(1)}[kind], 32)

    def elect(self):
        return self.lane == 0

    def ldmatrix(self, a, n, trans, mask):
        warps = np.flatnonzero(self.converged(mask))
        lanes = (warps[:, None] * 32 + np.arange(8 * n)).ravel()
        v = self.S.load(a[lanes], lanes, 4, 4)  # rows of 16 bytes
        rows = np.ascontiguousarray(v.T).view(u2).reshape(len(warps), n, 8, 8)
        if trans:
            rows = np.ascontiguousarray(rows.transpose(0, 1, 3, 2))
        regs = rows.view(u4).reshape(len(warps), n, 32).transpose(1, 0, 2)
        if mask is None:
            return np.ascontiguousarray(regs).reshape(n, self.n)
        out = np.zeros((n, self.warps, 32), u4)
        out[:, warps] = regs
        return out.reshape(n, self.n)

    def stmatrix(self, a, registers, trans, mask):
        warps, n = np.flatnonzero(self.converged(mask)), len(registers)
        regs = np.stack([np.broadcast_to(r, self.n) for r in registers]).reshape(n, self.warps, 32)[:, warps]
        rows = np.ascontiguousarray(regs.transpose(1, 0, 2)).view(u2).reshape(len(warps), n, 8, 8)
        if trans:
            rows = np.ascontiguousarray(rows.transpose(0, 1, 3, 2))
        lanes = (warps[:, None] * 32 + np.arange(8 * n)).ravel()
        words = rows.reshape(-1, 8).view(u4)
        self.S.store(a[lanes], lanes, 4, [words[:, i] for i in range(4)])

    def mma(self, shape, t, x, y, c, mask):
        """m16n8k*: rows and columns of a thread by its group (lane / 4) and its place in it."""
        self.converged(mask)
        k = int(shape.split("k")[1])
        W, per = self.warps, 1 if t == "tf32" else 2

        def stack(registers):
            return np.stack([np.broadcast_to(r, self.n) for r in registers])

        a = decode(stack(x), t)  # register, thread, half
        assert shape.startswith("m16n8k") and k == 4 * per * len(x) // 2 and len(y) == len(x) // 2, shape
        a = a.reshape(len(x) // 2, 2, W, 8, 4, per).transpose(2, 1, 3, 0, 4, 5).reshape(W, 16, k)
        b = decode(stack(y), t).reshape(len(y), W, 8, 4, per).transpose(1, 0, 3, 4, 2).reshape(W, k, 8)
        d = stack(c).view(f4).reshape(2, 2, W, 8, 4).transpose(2, 0, 3, 4, 1).reshape(W, 16, 8)
        d = (a @ b + d).astype(f4)
        d = d.reshape(W, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, self.n)
        return np.ascontiguousarray(d).view(u4)
