"""Estimates from machine code how many cycles a Hopper multiprocessor needs for a kernel's programs, without a GPU.

code = instructions(made.asm["cubin"])
estimate(code, warps=4, resident=3, trips={0x54d0: 3}, memory=lambda *_: "dram").cycles      of one program

Four schedulers, each of which issues one instruction a cycle of a warp whose control bits (stall count, scoreboard
barriers) and pipe allow it, in order; the pipes (FMA, ALU and conversions at half rate, special functions at an
eighth); shared memory at 128 bytes a cycle; wgmma at its datasheet's rate, bound by shared memory where operands lie
there; L2 and DRAM as latencies and a share of their bandwidth. What it does not know: bank conflicts, clocks, other
multiprocessors, instruction fetch. It is within a quarter of what Triton's attention is known to reach at 578 tokens,
and it ranks variants of one kernel better than that: good to choose what is worth measuring, no measurement.

The control bits are laid out as in Maxwell's and later code (NervanaSystems/maxas; Jia et al., arXiv 1804.06826).
"""

import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import triton

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# Cycles, and bytes a cycle of one of 132 multiprocessors at 1.755 GHz.
DRAM_BYTES, DRAM_LATENCY = 13.0, 750  # nine tenths of an H100's 3.35 TB/s
L2_BYTES, L2_LATENCY = 40.0, 280
SHARED_BYTES, SHARED_LATENCY = 128, 29
TENSOR_LATENCY, BARRIER, SPECIAL_LATENCY, CONSTANT_LATENCY, LAUNCH = 40, 20, 24, 30, 400

ALU = set(
    "IADD3 LOP3 FMNMX FSEL ISETP FSETP SHF LEA SEL PRMT MOV IABS PLOP3 VIADD SGXT P2R R2P F2FP CS2R BMSK IMNMX VIMNMX "
    "VIADDMNMX FMNMX3".split()
)
# Pipe and cycles for which it is taken by one instruction of a warp.
PIPES = {"FFMA": ("fma", 1), "FMUL": ("fma", 1), "FADD": ("fma", 1), "HFMA2": ("fma", 1), "IMAD": ("imad", 2)}
PIPES |= dict.fromkeys(ALU, ("alu", 2)) | dict.fromkeys(("MUFU", "I2F", "F2I", "POPC", "I2FP"), ("special", 8))
SHARED = ("LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMS")
GLOBAL = ("LDG", "STG", "LDGSTS")
SPILLS = ("LDL", "STL")


@dataclass
class Instruction:
    pc: int
    name: str  # with its modifiers: LDG.E.128
    text: str
    predicate: str | None
    stall: int  # cycles until the warp's next instruction
    sets: int  # the scoreboard barrier that its result releases; 7: none
    reads: int  # the one that its operands release
    waits: int  # mask of those it waits for
    kind: str = ""
    pipe: str | None = None
    taken: int = 1
    bytes: int = 0  # moved by a warp
    target: int | None = None

    def __post_init__(self):
        self.kind = self.name.split(".")[0]
        self.pipe, self.taken = PIPES.get(self.kind, (None, 1))
        if self.kind in (*SHARED, *GLOBAL, *SPILLS):
            self.bytes = 32 * next((n for key, n in ((".128", 16), (".64", 8), (".U16", 2)) if key in self.name), 4)
        if self.kind in ("LDSM", "STSM"):
            matrices = re.search(r"\.([124])$", self.name)
            self.bytes = 128 * (int(matrices[1]) if matrices else 1)
        if self.kind == "BRA":
            self.target = int(re.search(r"0x[0-9a-f]+", self.text)[0], 16)


def instructions(cubin: bytes) -> list[Instruction]:
    """Of the machine code of a compiled kernel, its asm["cubin"]."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        listing = subprocess.run([TOOL, "-sass", file], capture_output=True, text=True, check=True).stdout
    word = r"/\* 0x([0-9a-f]{16}) \*/"  # each instruction has two; the second holds the control bits
    line = r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(\S.*?)\s*;\s*" + word + r"\s*" + word
    found = re.findall(line, listing)
    made = []
    for pc, predicate, text, _, control in found:
        bits = int(control, 16) >> 41
        made.append(
            Instruction(
                int(pc, 16), text.split()[0], text, predicate or None,
                stall=bits & 15, sets=bits >> 5 & 7, reads=bits >> 8 & 7, waits=bits >> 11 & 63,
            )
        )  # fmt: skip
    return made


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """(first, last) instruction of each loop, inner ones before those around them."""
    found = [(i.target, i.pc) for i in code if i.kind == "BRA" and i.target < i.pc]
    return sorted(found, key=lambda loop: loop[1] - loop[0])


def leaves(code: list[Instruction], loop: tuple[int, int]) -> int:
    """The branch that closes a loop, or where that has no condition the last exit inside."""
    first, last = loop
    inside = [i for i in code if first <= i.pc <= last]
    return last if inside[-1].predicate else [i.pc for i in inside if i.kind == "EXIT" and i.predicate][-1]


@dataclass
class Estimate:
    cycles: float  # of one program, once the multiprocessor is full
    issued: float  # shares of time: of the issue slots, the tensor cores, the special functions, shared memory
    tensor: float
    special: float
    shared: float
    dram_bytes: float  # of one program


@dataclass
class _Program:
    number: int
    warps: list = field(default_factory=list)
    arrived: Counter = field(default_factory=Counter)  # warps at a barrier, or that issued a wgmma
    products: dict = field(default_factory=lambda: defaultdict(float))  # when a wgmma ends
    ended: int = 0


class _Warp:
    def __init__(self, program: _Program, number: int, start: float, trips: dict[int, int]):
        self.program, self.number, self.ready, self.trips = program, number, start, dict(trips)
        self.at, self.blocked, self.barriers, self.wgmma = 0, False, 0, 0
        self.scoreboard = [0.0] * 8
        self.copies: list[float] = []  # since the last group of cp.async was closed
        self.groups: list[float] = []
        self.visits: Counter = Counter()


def estimate(
    code: list[Instruction],
    *,
    warps: int,
    resident: int,
    trips: dict[int, int],
    memory: Callable[[Instruction, int, int], str],
    waves: int = 6,
    useful: float = 1.0,
) -> Estimate:
    """resident: programs a multiprocessor holds, of which it takes `waves` in turn; the first is not counted. trips:
    how often the branch at an address is taken back, of every loop with a condition; or the exit in the midst of one
    without is passed. memory(instruction, n, m): where a load or store goes at its n-th execution by a warp of the m-th
    program: "dram", "l2", or "off" where its predicate is false. useful: the share of what is asked of DRAM that is not
    masked. Raises ValueError for a loop without its trips."""
    if unknown := [hex(way_out) for loop in loops(code) if (way_out := leaves(code, loop)) not in trips]:
        raise ValueError(f"how often the loops go round that are left at {', '.join(unknown)} is not said")
    return _Multiprocessor(code, warps, trips, memory, useful).run(resident, waves * resident)


class _Multiprocessor:
    def __init__(self, code, warps, trips, memory, useful):
        self.code, self.warps, self.trips, self.memory, self.useful = code, warps, trips, memory, useful
        self.index = {instruction.pc: i for i, instruction in enumerate(code)}
        self.schedulers: list[list[_Warp]] = [[], [], [], []]
        self.pipes = [defaultdict(float) for _ in range(4)]
        self.free = dict.fromkeys(("shared", "l2", "dram", "tensor"), 0.0)
        self.used: Counter = Counter()
        self.started = 0
        self.sleeps = [0.0] * 4  # until when no warp of a scheduler can issue

    def run(self, resident: int, programs: int) -> Estimate:
        ends: list[float] = []
        turn, now = [0] * 4, 0.0
        for i in range(resident):
            self._start(1500.0 * i)
        while len(ends) < programs:
            now = min(self.sleeps)
            if now == float("inf"):
                raise RuntimeError("the simulated program waits for ever")
            for s in range(4):
                if self.sleeps[s] > now:
                    continue
                warps = self.schedulers[s]
                warp = self._next(warps, s, turn[s], now)
                if warp is None:
                    self.sleeps[s] = min((w.ready for w in warps if not w.blocked), default=float("inf"))
                    continue
                self.sleeps[s] = now + 1
                turn[s] = warps.index(warp)
                if self._issue(warp, s, now):
                    warps.remove(warp)
                    if warp.program.ended == self.warps:
                        ends.append(now)
                        self._start(now + LAUNCH)
        share = {key: value / now for key, value in self.used.items()}
        return Estimate(
            (ends[-1] - ends[resident - 1]) / (programs - resident), share["issued"] / 4, share.get("tensor", 0.0),
            share.get("special", 0.0) / 4, share.get("shared", 0.0), self.used["dram"] / len(ends),
        )  # fmt: skip

    def _next(self, warps: list[_Warp], s: int, turn: int, now: float) -> _Warp | None:
        """The warp that issues, the last one first. Each that cannot yet learns when it may be asked again."""
        for warp in (*warps[turn:], *warps[:turn]):
            if not warp.blocked and warp.ready <= now:
                warp.ready = self._allowed(warp, s, now)
                if warp.ready <= now:
                    return warp
        return None

    def _start(self, now: float) -> None:
        program = _Program(self.started)
        self.started += 1
        program.warps = [_Warp(program, i, now, self.trips) for i in range(self.warps)]
        for warp in program.warps:
            self.schedulers[warp.number % 4].append(warp)
            self.sleeps[warp.number % 4] = min(self.sleeps[warp.number % 4], now)

    def _allowed(self, warp: _Warp, s: int, now: float) -> float:
        """When the warp's next instruction may issue at the earliest; now, if at once."""
        instruction, when = self.code[warp.at], now
        if instruction.waits:
            when = max(when, *(warp.scoreboard[b] for b in range(6) if instruction.waits >> b & 1))
        if instruction.pipe:
            when = max(when, self.pipes[s][instruction.pipe])
        if instruction.kind == "WARPGROUP" and "DEPBAR" in instruction.name and warp.wgmma:
            pending = int(re.search(r"0x[0-9a-f]+", instruction.text)[0], 16)
            key = warp.number // 4, warp.wgmma - 1 - pending
            if warp.program.arrived["wgmma", key] < 4 and key[1] >= 0:
                return now + 4
            when = max(when, warp.program.products[key])
        elif instruction.kind == "DEPBAR" and warp.groups:
            match = re.search(r"LE SB0, (0x[0-9a-f]+)", instruction.text)
            pending = int(match[1], 16) if match else 0
            when = max([when, *warp.groups[: len(warp.groups) - pending]])
        return when

    def _issue(self, warp: _Warp, s: int, now: float) -> bool:
        """Whether the warp has ended with it."""
        instruction = self.code[warp.at]
        kind, done = instruction.kind, now
        warp.at += 1
        warp.ready = now + max(1, instruction.stall)
        self.used["issued"] += 1
        if instruction.pipe:
            self.pipes[s][instruction.pipe] = now + instruction.taken
            self.used[instruction.pipe] += instruction.taken
            done = now + SPECIAL_LATENCY if instruction.pipe == "special" else now
        elif kind in SHARED or kind in SPILLS:
            cycles = 2 if kind == "SHFL" else max(1.0, instruction.bytes / SHARED_BYTES)
            done = self._take("shared", now, cycles) + SHARED_LATENCY
        elif kind in GLOBAL:
            done = self._memory(warp, instruction, now)
        elif kind == "LDGDEPBAR":
            warp.groups.append(max(warp.copies, default=0))
            warp.copies = []
        elif kind == "HGMMA":
            self._multiply(warp, instruction, now)
        elif kind == "BAR" and "SYNC" in instruction.name:
            self._meet(warp, now)
        elif kind in ("LDC", "ULDC", "S2R", "S2UR", "R2UR"):
            done = now + CONSTANT_LATENCY
        elif kind == "BRA":
            self._branch(warp, instruction)
        elif kind == "EXIT" and (instruction.predicate is None or self._taken(warp, instruction.pc, over=True)):
            warp.program.ended += 1
            return True
        board = warp.scoreboard
        if instruction.sets < 6:
            board[instruction.sets] = max(board[instruction.sets], now + 20 if kind == "LDGSTS" else done)
        if instruction.reads < 6:
            board[instruction.reads] = max(board[instruction.reads], now + 12)
        return False

    def _take(self, what: str, now: float, cycles: float) -> float:
        self.free[what] = max(self.free[what], now) + cycles
        self.used[what] += cycles
        return self.free[what]

    def _memory(self, warp: _Warp, instruction: Instruction, now: float) -> float:
        place = self.memory(instruction, warp.visits[instruction.pc], warp.program.number)
        warp.visits[instruction.pc] += 1
        done = now
        if place != "off":
            done = self._take("l2", now, instruction.bytes / L2_BYTES) + L2_LATENCY
        if place == "dram":
            moved = instruction.bytes * self.useful
            self.free["dram"] = max(self.free["dram"], now) + moved / DRAM_BYTES
            self.used["dram"] += moved
            done = max(done, self.free["dram"] + DRAM_LATENCY)
        if instruction.kind == "LDGSTS":
            warp.copies.append(done)
        return now + 20 if instruction.kind == "STG" else done

    def _multiply(self, warp: _Warp, instruction: Instruction, now: float) -> None:
        """A warp group's wgmma starts when its four warps have issued it."""
        key = warp.number // 4, warp.wgmma
        warp.wgmma += 1
        arrived = warp.program.arrived
        arrived["wgmma", key] += 1
        if arrived["wgmma", key] == 4:
            columns = int(re.search(r"64x(\d+)x16", instruction.name)[1])
            first_in_registers = len(re.findall(r"\bR\d+", instruction.text.split("gdesc")[0])) >= 2
            loaded = columns * 32 + (0 if first_in_registers else 64 * 32)
            end = self._take("tensor", now, max(columns / 2, loaded / SHARED_BYTES))
            warp.program.products[key] = end + TENSOR_LATENCY

    def _meet(self, warp: _Warp, now: float) -> None:
        program, key = warp.program, ("barrier", warp.barriers)
        warp.barriers += 1
        program.arrived[key] += 1
        warp.blocked = True
        if program.arrived[key] == self.warps:
            for other in program.warps:
                other.blocked, other.ready = False, max(other.ready, now + BARRIER)
                self.sleeps[other.number % 4] = min(self.sleeps[other.number % 4], other.ready)

    def _branch(self, warp: _Warp, instruction: Instruction) -> None:
        back = instruction.target <= instruction.pc
        unconditional = instruction.predicate is None and instruction.pc not in self.trips
        if unconditional or (back and self._taken(warp, instruction.pc)):
            warp.at = self.index[instruction.target]

    def _taken(self, warp: _Warp, pc: int, over: bool = False) -> bool:
        """Whether a loop goes round once more; over: whether it is left, by an exit in its midst."""
        if over and pc not in self.trips:
            return False
        again = warp.trips.get(pc, 0) > 0
        warp.trips[pc] = warp.trips[pc] - 1 if again else self.trips.get(pc, 0)
        return again != over
