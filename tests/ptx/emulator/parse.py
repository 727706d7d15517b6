"""Parses one kernel of PTX text into basic blocks."""

import re
from dataclasses import dataclass, field

from .control_flow import BRANCHES, EXITS, link

BYTES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4,
         "b64": 8, "u64": 8, "s64": 8, "f64": 8}  # fmt: skip
BARRIERS = ("bar.sync", "barrier.sync", "barrier.cta.sync")


@dataclass
class Instruction:
    op: str
    operands: list[str]
    predicate: str | None = None  # a register
    negated: bool = False
    line: int = 0
    source: str = ""  # file:line of the Triton source
    scope: int = 0  # of an inline assembly's labels


@dataclass
class Block:
    label: str
    instructions: list[Instruction] = field(default_factory=list)
    taken: int | None = None  # the block that a branch at the end goes to
    falls: int | None = None  # the block that follows where it does not

    @property
    def last(self) -> Instruction | None:
        return self.instructions[-1] if self.instructions else None


@dataclass
class Program:
    name: str
    params: list[tuple[str, str]]  # name, type
    registers: dict[str, str]  # name -> b16, b32, b64 or pred
    blocks: list[Block]
    order: list[int]  # priority of each block


def parse(text: str) -> Program:
    """The only kernel of the text. Every CTA-wide barrier begins a block."""
    header = re.search(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)", text, re.DOTALL)
    assert header, "no kernel"
    params = re.findall(r"\.param\s+\.(\w+)[^,]*?\b(\w+)\s*(?:,|$)", header[2].strip())
    files = {int(n): f for n, f in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.MULTILINE)}
    start = text.index("{", header.end()) + 1
    reader = _Reader(files)
    for number, line in enumerate(text[start:].split("\n"), text[:start].count("\n") + 1):
        reader.read(number, line.split("//")[0].strip())
        if not reader.scopes:
            break
    order = link(reader.blocks)
    return Program(header[1], [(name, kind) for kind, name in params], reader.registers, reader.blocks, order)


class _Reader:
    """Of a kernel's body. Inline assembly stands in braces, a scope of register names and labels of its own."""

    def __init__(self, files: dict[int, str]):
        self.files = files
        self.registers: dict[str, str] = {}
        self.blocks = [Block("entry")]
        self.scopes: list[tuple[int, dict[str, str]]] = [(0, {})]  # number, name -> unique name
        self.source, self.pending = "", ""

    def read(self, number: int, line: str):
        while line and self.scopes:
            if self.pending:
                line = self._statement_part(number, line)
            elif loc := re.match(r"\.loc\s+(\d+)\s+(\d+)[^;]*$", line):
                self.source, line = f"{self.files.get(int(loc[1]), loc[1])}:{loc[2]}", ""
            elif label := re.match(r"([$\w]+):\s*(.*)$", line):
                self._label(label[1])
                line = label[2]
            elif line[0] == "{":
                self.scopes.append((len(self.registers) + number * 100000, {}))
                line = line[1:].strip()
            elif line[0] == "}":
                self.scopes.pop()
                line = line[1:].strip()
            elif re.match(r"\.pragma|\.maxn|\.minn|\.reqn", line):
                line = line.partition(";")[2].strip()
            else:
                line = self._statement_part(number, line)

    def _label(self, label: str):
        if not label.startswith(("$L__tmp", "$L__func")):  # for debuggers
            scope = self.scopes[-1][0]
            self.blocks.append(Block(f"{label}@{scope}" if scope else label))

    def _statement_part(self, number: int, line: str) -> str:
        before, semicolon, rest = line.partition(";")
        self.pending += before + " "
        if not semicolon:
            return ""
        statement, self.pending = self.pending.strip(), ""
        if statement.startswith((".local", ".shared")):
            raise NotImplementedError(f"line {number}: {statement}")
        if statement.startswith(".reg"):
            self._declare(number, statement)
        elif statement:
            self._instruction(number, statement)
        return rest.strip()

    def _declare(self, number: int, statement: str):
        declaration = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.DOTALL)
        assert declaration, statement
        kind, names = declaration.groups()
        scope, local = self.scopes[-1]
        for name in names.split(","):
            many = re.match(r"(%?\w+)<(\d+)>", name.strip())
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]:
                local[one] = f"{one}@{number}" if scope else one
                self.registers[local[one]] = "pred" if kind == "pred" else f"b{8 * BYTES[kind]}"

    def _instruction(self, number: int, statement: str):
        match = re.match(r"(?:@(!?)([%\w]+)\s+)?([a-zA-Z_][\w.:]*)\s*(.*)$", statement, re.DOTALL)
        assert match, f"line {number}: {statement}"
        negated, predicate, op, rest = match.groups()
        local = {k: v for _, names in self.scopes[1:] for k, v in names.items()}

        def rename(text: str) -> str:
            return re.sub(r"%?[A-Za-z_]\w*", lambda name: local.get(name[0], name[0]), text)

        instruction = Instruction(
            op, _operands(rename(rest)), predicate and rename(predicate), bool(negated), number, self.source,
            self.scopes[-1][0],
        )  # fmt: skip
        if op.startswith(BARRIERS) and self.blocks[-1].instructions:
            self.blocks.append(Block(f"bar@{number}"))
        self.blocks[-1].instructions.append(instruction)
        if op in BRANCHES or op in EXITS or op.startswith("brx"):
            self.blocks.append(Block(f"after@{number}"))


def _operands(text: str) -> list[str]:
    """Split at commas that stand in no bracket."""
    found, depth, current = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += c
    return [*found, current.strip()] if current.strip() else found
