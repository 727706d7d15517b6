"""sm_100: tensor memory, tcgen05 and the mbarriers that tell when its products are done. Part of cta.CTA."""

import numpy as np

from .floats import decode
from .memory import Fault
from .operands import Unsupported

LANES, COLUMNS = 128, 512


class TensorMemory:
    def start_tensor_memory(self):
        self.cells = np.full((LANES, COLUMNS), 0x7FC12345, np.uint32)
        self.cell_writer = np.zeros((LANES, COLUMNS), np.int32)  # as of memory.Region
        self.cell_pending = np.zeros((LANES, COLUMNS), np.int16)
        self.allocated, self.barriers, self.in_flight, self.waits = 0, {}, [], 0

    def one_thread(self, mask):
        lanes = self.everyone if mask is None else np.flatnonzero(mask)
        if len(lanes) > 1:
            raise Fault(f"{self.clock.where}: by {len(lanes)} threads, not by one")
        return int(lanes[0]) if len(lanes) else None

    def tensor_alloc(self, a, columns, mask):
        warps = np.flatnonzero(self.converged(mask))
        if len(warps):
            t = warps[:1] * 32
            self.S.store(a[t], t, 4, [np.array([self.allocated], np.uint32)])
            self.allocated += columns
            if self.allocated > COLUMNS or columns & (columns - 1) or columns < 32:
                raise Fault(f"{self.clock.where}: {columns} columns of tensor memory")

    # --- barriers

    def barrier_init(self, a, count, mask):
        t = self.one_thread(mask)
        if t is not None:
            self.barriers[int(a[t])] = {
                "count": int(count),
                "arrived": 0,
                "phase": 0,
                "products": [],
                "epoch": self.clock.epoch,
                "warp": t // 32,
            }

    def barrier_invalidate(self, a, mask):
        t = self.one_thread(mask)
        if t is not None:
            if int(a[t]) not in self.barriers:
                raise Fault(f"{self.clock.where}: no barrier there")
            del self.barriers[int(a[t])]

    def tensor_commit(self, a, mask):
        t = self.one_thread(mask)
        if t is None:
            return
        b = self.barriers.get(int(a[t]))
        if b is None:
            raise Fault(f"{self.clock.where}: a barrier that is not initialised")
        b["products"] += self.in_flight
        self.in_flight = []
        b["arrived"] += 1
        if b["arrived"] == b["count"]:
            b["arrived"], b["phase"] = 0, b["phase"] + 1

    def barrier_try_wait(self, a, parity, mask):
        lanes = self.everyone if mask is None else np.flatnonzero(mask)
        done, parity = np.zeros(self.n, bool), np.broadcast_to(parity, self.n)
        for address in np.unique(a[lanes]):
            mine = lanes[a[lanes] == address]
            b = self.barriers.get(int(address))
            if b is None:
                raise Fault(f"{self.clock.where}: a barrier that is not initialised")
            if b["epoch"] == self.clock.epoch and (mine // 32 != b["warp"]).any():
                raise Fault(f"{self.clock.where}: race: the barrier was initialised since the last CTA-wide barrier")
            ok = (b["phase"] & 1) != (parity[mine] & 1)
            done[mine] = ok
            if ok.any() and b["products"]:
                for cells, reads in b["products"]:
                    self.cell_pending[cells] -= 1
                    for idx in reads:
                        self.S.async_read[idx] -= 1  # for all threads: the barrier says that the product is done
                b["products"] = []
        self.waits = 0 if done[lanes].all() else self.waits + 1
        if self.waits > 100:
            raise Fault(f"{self.clock.where}: waits for ever")
        return done

    # --- data

    def tensor_cells(self, a, shape, n, split, mask):
        """(registers, threads) lanes and columns, and the threads."""
        warps = np.flatnonzero(self.converged(mask))
        threads = (warps[:, None] * 32 + np.arange(32)).ravel()
        a, t = a[threads], threads % 32
        lane, column = a >> 16, a & 0xFFFF
        if (a.reshape(-1, 32) != a.reshape(-1, 32)[:, :1]).any():
            raise Fault(f"{self.clock.where}: threads of a warp give different addresses")
        if shape == "32x32b":
            lane = lane + t
        elif shape == "16x32bx2":
            lane, column = lane + t % 16, column + np.where(t >= 16, split, 0)
        else:
            raise Unsupported(f"tcgen05 shape {shape}")
        if (lane // 32 != threads // 32 % 4).any():
            raise Fault(f"{self.clock.where}: lanes of tensor memory of another warp")
        columns = column[None] + np.arange(n)[:, None]
        if (columns >= self.allocated).any():
            raise Fault(f"{self.clock.where}: columns of tensor memory that are not allocated")
        return np.broadcast_to(lane, columns.shape), columns, threads

    def tensor_load(self, a, shape, n, split, mask):
        lane, column, threads = self.tensor_cells(a, shape, n, split, mask)
        if self.cell_pending[lane, column].any():
            raise Fault(f"{self.clock.where}: the result of a product in flight")
        out = np.zeros((n, self.n), np.uint32)
        out[:, threads] = self.cells[lane, column]
        return out

    def tensor_store(self, a, shape, registers, split, mask):
        n = len(registers)
        lane, column, threads = self.tensor_cells(a, shape, n, split, mask)
        if self.cell_pending[lane, column].any():
            raise Fault(f"{self.clock.where}: into the operands of a product in flight")
        self.cells[lane, column] = np.stack([np.broadcast_to(r, self.n)[threads] for r in registers])
        self.cell_writer[lane, column] = self.clock.epoch * 64 + threads // 32

    def tensor_product(self, d, x, x_in_tensor, y, description, accumulate, mask, tf32):
        t = self.one_thread(mask)
        if t is None:
            return
        description = int(np.broadcast_to(description, self.n)[t])
        m, n = (description >> 24 & 31) * 16, (description >> 17 & 63) * 8
        types, k = ({2: "tf32"}, 8) if tf32 else ({0: "f16", 1: "bf16"}, 16)
        left_type, right_type = types[description >> 7 & 7], types[description >> 10 & 7]
        if description >> 4 & 3 != 1 or description >> 13 & 3 or m not in (64, 128) or (tf32 and description >> 15 & 3):
            raise Unsupported(f"instruction descriptor {description:#x}")
        i = np.arange(m)
        rows = i if m == 128 else i // 16 * 32 + i % 16

        def cells(address, columns):
            lane, column = rows + (address >> 16), (address & 0xFFFF) + np.arange(columns)
            if lane.max() >= LANES or column.max() >= self.allocated:
                raise Fault(f"{self.clock.where}: outside of the allocated tensor memory")
            where = np.ix_(lane, column)
            writer = self.cell_writer[where]
            if (((writer >> 6) == self.clock.epoch) & ((writer & 63) != t // 32)).any():
                raise Fault(f"{self.clock.where}: race: another warp wrote the tensor memory since the last barrier")
            return where

        out = cells(int(np.broadcast_to(d, self.n)[t]), n)
        reads = []
        if x_in_tensor:
            where = cells(int(x[t]), 8)
            left = decode(self.cells[where].reshape(-1), left_type).reshape(m, k)
        else:
            left, idx = self.tensor_operand(
                int(np.broadcast_to(x, self.n)[t]), m, k, description >> 15 & 1, left_type, t
            )
            reads.append(idx)
        right, idx = self.tensor_operand(int(np.broadcast_to(y, self.n)[t]), n, k, description >> 16 & 1, right_type, t)
        reads.append(idx)
        result = left @ right.T
        if np.broadcast_to(accumulate, self.n)[t]:
            result = result + self.cells[out].view(np.float32)
        self.cells[out] = result.astype(np.float32).view(np.uint32)
        self.cell_pending[out] += 1
        for idx in reads:
            self.S.async_read[idx] += 1
        self.in_flight.append((out, reads))

    def tensor_operand(self, d, mn, k, trans, t, thread):
        if d >> 46 & 7 != 1 or d >> 49 & 7 or d >> 52 & 1:
            raise Unsupported(f"shared memory descriptor {d:#x}")
        swizzle = {0: 0, 2: 1, 4: 2, 6: 3}[d >> 61 & 7]
        return self.shared_operand(d, swizzle, mn, k, trans, t, (thread // 32, thread // 32), False)
