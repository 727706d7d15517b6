"""Operands of PTX instructions as Python expressions on the register list R, one NumPy element per thread."""

import re

import numpy as np

from .parse import BYTES, Program

NUMPY = {"u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "u8": np.uint64, "i1": np.int8, "i2": np.int16,
         "i4": np.int32, "i8": np.int64, "f2": np.float16, "f4": np.float32, "f8": np.float64}  # fmt: skip
SPECIAL = {"%tid.x": "X.tid", "%tid.y": "X.zero", "%tid.z": "X.zero", "%ntid.x": "X.ntid", "%laneid": "X.lane",
           "%warpid": "X.warp", "%clusterid.x": "X.ctaid[0]", "%cluster_ctarank": "X.zero",
           **{f"%{name}.{axis}": f"X.{name}[{i}]" for name in ("ctaid", "nctaid") for i, axis in enumerate("xyz")},
           }  # fmt: skip


class Unsupported(NotImplementedError):
    """An instruction that nobody has written down yet."""


def numpy_type(t: str) -> str:
    """NumPy's short name of a PTX type; bf16 has none."""
    if t in ("pred", "bf16"):
        return t
    return {"b": "u", "u": "u", "s": "i", "f": "f"}[t[0]] + str(BYTES[t])


def bits(t: str) -> str:
    """The untyped PTX type of the same width: "s32" -> "b32"."""
    return "b" + t[1:]


class Operands:
    """`mask`, an expression, says which threads execute the instruction; None where all do."""

    mask: str | None

    def __init__(self, program: Program):
        self.program = program
        self.slots = {name: i for i, name in enumerate(program.registers)}
        self.constants: dict[str, object] = {}
        self.params: dict[str, int] = {}  # offsets in the constant bank
        self.param_bytes = 0
        for name, t in program.params:
            size = BYTES[t]
            self.params[name] = (self.param_bytes + size - 1) // size * size
            self.param_bytes = self.params[name] + size

    def constant(self, value) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def width(self, register: str) -> int:
        kind = self.program.registers[register]
        return 0 if kind == "pred" else int(kind[1:]) // 8

    def src(self, operand: str, t: str) -> str:
        """An operand read as PTX type t. bf16 is read as float32."""
        nt = numpy_type(t)
        if operand in self.slots:
            code, width = f"R[{self.slots[operand]}]", self.width(operand)
            if t == "pred":
                assert width == 0
                return code
            need = 2 if t == "bf16" else int(nt[1])
            if width != need:  # ld, st and cvt take wider registers
                assert width > need, (operand, t)
                code = f"{code}.astype(u{need})"
            if t == "bf16":
                return f"bf16({code})"
            return code if nt[0] == "u" else f"{code}.view({nt})"
        if operand in SPECIAL:
            return SPECIAL[operand]
        if operand == "global_smem":
            return "X.smem"
        if operand in self.params:
            return self.constant(np.uint32(self.params[operand]))
        return self.constant(self._immediate(operand, t))

    def sources(self, operands: list[str], t: str) -> str:
        return ", ".join(self.src(operand, t) for operand in operands)

    def _immediate(self, text: str, t: str):
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            single = np.uint32(int(m[1], 16))
            if t in ("b32", "u32", "s32"):
                return single
            return single.view(np.float32) if t == "f32" else np.float64(single.view(np.float32))
        if m := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
            double = np.uint64(int(m[1], 16))
            return double if t[0] != "f" else double.view(np.float64)
        m = re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text)
        if not m:
            raise Unsupported(f"operand {text}")
        octal = len(m[2]) > 1 and m[2][0] == "0" and m[2][1] not in "xXbB"
        value = int(m[2], 8 if octal else 0) * (-1 if m[1] else 1)
        if t == "pred":
            return np.bool_(value != 0)
        if t == "bf16":
            return np.array(value << 16, np.uint32).view(np.float32)[()]
        nt = numpy_type(t)
        raw = np.array(value & (2 ** (8 * int(nt[1])) - 1), NUMPY[f"u{nt[1]}"])
        return raw.view(NUMPY[nt])[()]

    def set(self, dst: str, code: str, t: str) -> list[str]:
        """R[dst] = code, which is of PTX type t (bf16: float32 numbers to round)."""
        if dst == "_":
            return []
        if "|" in dst:
            raise Unsupported("two destinations")
        slot, width = self.slots[dst], self.width(dst)
        if t == "pred":
            raw = code
        else:
            nt = numpy_type(t)
            if t == "bf16":
                raw, size = f"to_bf16({code})", 2
            else:
                size = int(nt[1])
                if size < width and nt[0] == "i":  # a wider register keeps the sign
                    code, nt, size = f"({code}).astype(i{width})", f"i{width}", width
                raw = code if nt[0] == "u" else f"({code}).view(u{size})"
            if size != width:
                raw = f"({raw}).astype(u{width})"
        if not any(name in code for name in ("R[", "X.", "v[")) and code != "v":
            raw = f"X.full({raw})"
        return [f"R[{slot}] = {raw}" if self.mask is None else f"R[{slot}] = where({self.mask}, {raw}, R[{slot}])"]

    def set_each(self, destinations: list[str], t: str) -> list[str]:
        """From v, an array of one row a register."""
        return [line for i, dst in enumerate(destinations) for line in self.set(dst, f"v[{i}]", t)]

    def vector(self, text: str) -> list[str]:
        text = text.strip()
        return [x.strip() for x in text[1:-1].split(",")] if text.startswith("{") else [text]

    def address(self, text: str, width: int) -> str:
        """As int64, what indexing wants; 32-bit addresses are of shared memory."""
        m = re.fullmatch(r"\[\s*([%$\w@.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not m:
            raise Unsupported(f"address {text}")
        base, offset = m[1], int(m[2] or "0", 0)
        code = "X.smem" if base == "global_smem" else f"R[{self.slots[base]}]"
        code = f"{code}.astype(i8)" if width == 4 else f"{code}.view(i8)"
        return f"({code} + {offset})" if offset else code
