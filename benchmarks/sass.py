"""What a compiled kernel costs: the instructions of its inner loop, from its SASS.

    slots an element = instructions on the shortest way round the loop / elements of a lane

The loop is given by what it must do (load, shuffle, exponentiate), so code for the edges of a row,
which the loop can branch to, does not count. Nothing here runs on a GPU, and nothing is measured.
"""

from __future__ import annotations

import functools
import heapq
import importlib.util
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*);")
_ENDS = ("BRA", "BRX", "EXIT", "RET", "CALL", "BREAK", "JMP")
_SIZES = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}

# the pipe that executes an instruction, by its first word; what is not here takes an issue slot
PIPES = {
    "FMA": ["FFMA", "FADD", "FMUL", "FFMA32I", "FMUL32I", "FADD32I", "FFMA2", "FADD2", "FMUL2"],
    "IMAD": ["IMAD", "IMAD32I", "IMUL"],
    "MUFU": ["MUFU"],
    "ALU": [
        "IADD3",
        "LOP3",
        "SHF",
        "PRMT",
        "SEL",
        "FSEL",
        "FMNMX",
        "ISETP",
        "FSETP",
        "LEA",
        "VIMNMX",
        "IMNMX",
        "PLOP3",
    ],
    "SHFL": ["SHFL"],
}
_PIPE_OF = {op: pipe for pipe, ops in PIPES.items() for op in ops}


@dataclass(frozen=True)
class Instruction:
    address: int
    predicated: bool
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        found = re.findall(r"0x([0-9a-f]+)", self.operands)
        return int(found[-1], 16) if self.opcode.startswith("BRA") and found else None


@dataclass(frozen=True)
class Loop:
    """Counts are instructions of a warp on one way round, in which a lane does ``elements``."""

    opcodes: tuple[str, ...]
    elements: int

    @property
    def slots(self) -> float:
        return len(self.opcodes) / self.elements

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, op) is not None for op in self.opcodes)

    @property
    def pipes(self) -> dict[str, float]:
        """{pipe: instructions for an element}, and all of them as "issue"."""
        counts = Counter(_PIPE_OF.get(op.split(".")[0], "other") for op in self.opcodes)
        return {"issue": self.slots, **{p: counts[p] / self.elements for p in PIPES}}

    @property
    def load_widths(self) -> dict[int, int]:
        """{bytes: loads of that width from global memory} of a lane."""
        loads = [op for op in self.opcodes if op.startswith(("LDG.", "LDGSTS."))]
        return dict(Counter(width(op) for op in loads))

    @property
    def spills(self) -> int:
        return self.count("LDL|STL")


def width(opcode: str) -> int:
    return next((size for part, size in _SIZES.items() if part in opcode), 4)


@functools.cache
def tool(name: str) -> Path | None:
    """cuobjdump or nvdisasm of the installed Triton."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    return path if path.is_file() else None


def unavailable() -> str | None:
    missing = [name for name in ("cuobjdump", "nvdisasm") if tool(name) is None]
    return f"no {' or '.join(missing)} in Triton's wheel" if missing else None


def dump(path: Path, *flags: str) -> str:
    command = [str(tool("cuobjdump")), *flags, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def functions(path: Path, arch: int) -> dict[str, list[Instruction]]:
    """{kernel: its code} of a cubin, or of what a library has for an architecture."""
    _, *parts = re.split(r"Function : ", dump(path, "-sass", "-arch", f"sm_{arch}"))
    return {part.split("\n", 1)[0].strip(): parse(part) for part in parts}


@functools.cache
def registers(path: Path, arch: int) -> dict[str, dict[str, int]]:
    """{kernel: {"REG": registers a thread, "STACK": bytes, "LOCAL": bytes, ...}}."""
    report = dump(path, "-res-usage", "-arch", f"sm_{arch}")
    pairs = re.findall(r"Function (\S+):\s*\n\s*(.*)", report)
    return {name: {k: int(n) for k, n in re.findall(r"(\w+):(\d+)", use)} for name, use in pairs}


def parse(text: str) -> list[Instruction]:
    return [
        Instruction(int(at, 16), bool(predicate), opcode, operands)
        for at, predicate, opcode, operands in _LINE.findall(text)
    ]


class Graph:
    """Basic blocks, by the index of their first instruction."""

    def __init__(self, code: list[Instruction]):
        self.code = code
        self._ways: dict[int, dict[int, tuple[int, ...]]] = {}
        index = {instruction.address: i for i, instruction in enumerate(code)}
        starts = {0}
        for i, instruction in enumerate(code):
            if instruction.opcode.split(".")[0] in _ENDS:
                starts.add(i + 1)
            if instruction.target in index:
                starts.add(index[instruction.target])
        ordered = sorted(s for s in starts if s < len(code))
        self.end = dict(zip(ordered, [*ordered[1:], len(code)], strict=True))
        self.successors = {start: self._successors(start, index) for start in ordered}

    def _successors(self, start: int, index: dict[int, int]) -> list[int]:
        last, behind = self.code[self.end[start] - 1], self.end[start]
        falls = [behind] if behind < len(self.code) else []
        if last.target in index:
            # by its guard, by a predicate or register before its target, or by lanes that diverge
            conditional = last.predicated or re.match(r"\s*[!~]?U?[PR]\w", last.operands)
            return [index[last.target], *(falls if conditional else [])]
        if last.opcode.split(".")[0] in ("EXIT", "RET", "BRX", "JMP"):
            return falls if last.predicated else []
        return falls

    def size(self, start: int) -> int:
        return self.end[start] - start

    def opcodes(self, start: int) -> list[str]:
        return [i.opcode for i in self.code[start : self.end[start]]]

    def ways(self, source: int) -> dict[int, tuple[int, ...]]:
        """{block: the blocks after ``source`` on the way to it} with the fewest instructions.

        The way of ``source`` to itself is a loop.
        """
        if source in self._ways:
            return self._ways[source]
        found = self._ways[source] = {}
        queue: list[tuple[int, tuple[int, ...]]] = [(0, ())]
        while queue:
            cost, way = heapq.heappop(queue)
            at = way[-1] if way else source
            if way:
                if at in found:
                    continue
                found[at] = way
            for after in self.successors[at]:
                if after not in found:
                    heapq.heappush(queue, (cost + self.size(after), (*way, after)))
        return found

    def shortest_loop(self, needs: list[tuple[str, int]]) -> list[str] | None:
        """Opcodes of the cheapest way round through a block with ``count`` instructions that match
        ``pattern``, for each (pattern, count) in the order that they come in.
        """
        candidates = [
            [s for s in self.end if sum(bool(re.match(p, op)) for op in self.opcodes(s)) >= count]
            for p, count in needs
        ]
        best: tuple[int, ...] | None = None
        for first in candidates[0]:
            reached: dict[int, tuple[int, ...]] = {first: ()}
            for goals in candidates[1:]:
                onward: dict[int, tuple[int, ...]] = {}
                for at, way in reached.items():
                    for goal in goals:
                        if at != goal and goal not in self.ways(at):
                            continue
                        whole = way if at == goal else way + self.ways(at)[goal]
                        if goal not in onward or self._cost(whole) < self._cost(onward[goal]):
                            onward[goal] = whole
                reached = onward
            for at, way in reached.items():
                if first in self.ways(at):
                    whole = way + self.ways(at)[first]
                    if best is None or self._cost(whole) < self._cost(best):
                        best = whole
        return None if best is None else [op for start in best for op in self.opcodes(start)]

    def _cost(self, way: tuple[int, ...]) -> int:
        return sum(map(self.size, way))


def inner_loop(code: list[Instruction], elements: int, *needs: tuple[str, int]) -> Loop | None:
    """The shortest loop that meets ``needs`` and exponentiates ``elements`` a lane."""
    found = Graph(code).shortest_loop([*needs, (r"MUFU\.EX2", elements)])
    return None if found is None else Loop(tuple(found), elements)
