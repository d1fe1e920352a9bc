"""PTX text to kernels: parameters, registers, variables and a list of instructions.

Grammar: PTX ISA, chapters 4 and 5. What is not understood raises, and so does a function that is
called or declared: the kernels of this project are inlined whole, and a call that is left over is
one to a function the device does not have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .numbers import SIZE


class Unsupported(Exception):
    """PTX that the executor does not know: it never guesses."""


@dataclass
class Instruction:
    text: str
    predicate: str | None
    negated: bool
    op: list[str]
    args: list[str]
    index: int
    hits: int = 0


@dataclass
class Variable:
    name: str
    align: int
    size: int | None  # None: as much as the launch asks for
    initial: bytes = b""


@dataclass
class Kernel:
    name: str
    params: list[Variable]
    block_limit: int | None
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, object] = field(default_factory=dict)  # "pred", or bytes
    shared: list[Variable] = field(default_factory=list)
    local: list[Variable] = field(default_factory=list)
    body: str | None = None  # until it is parsed


@dataclass
class Module:
    kernels: dict[str, Kernel]
    statics: list[Variable]


_DECLARATION = re.compile(
    r"\.(?P<space>shared|global|const|local)\s+(?:\.attribute\([^)]*\)\s*)?"
    r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$]+)\s*"
    r"(?P<dims>(?:\[\d*\])*)\s*(?:=\s*(?P<init>.*))?$",
    re.S,
)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?\s*((?:\.\w+[^{;]*?)*)\{", re.S)
_LEADING = re.compile(r"[{}]|[\w$]+\s*:(?!:)")
_REGISTERS = re.compile(r"([\w$%]+)<(\d+)>")


def split(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def parse(text: str) -> Module:
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"\.section\s+\.\w+\s*\{[^}]*\}", "", text)
    if external := re.search(r"\.func\b[^;{]*", text):
        raise Unsupported(f"a function that is not inlined: {' '.join(external[0].split())}")
    kernels, outside, at = {}, [], 0
    while head := _ENTRY.search(text, at):
        outside.append(text[at : head.start()])
        end = _closing(text, head.end() - 1)
        limit = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", head[3])
        params = [_parameter(p) for p in split(head[2] or "")]
        kernel = Kernel(head[1], params, int(limit[1]) if limit else None)
        kernel.body = text[head.end() : end]
        kernels[kernel.name] = kernel
        at = end + 1
    shared, statics = [], []
    for statement in ";".join([*outside, text[at:]]).split(";"):
        found = _module_variable(statement)
        if found:
            (shared if found[0] == "shared" else statics).append(found[1])
    for kernel in kernels.values():
        kernel.shared += shared
    return Module(kernels, statics)


def _module_variable(statement: str):
    lines = [s for s in statement.splitlines() if not re.match(r"\s*\.(version|target|file)\b", s)]
    rest = re.sub(r"\.address_size\s+\d+", "", " ".join(lines))
    rest = re.sub(r"\.(extern|visible|weak|common)\b", "", rest).strip()
    return _declaration(rest) if rest else None


def _closing(text: str, start: int) -> int:
    depth = 0
    for m in re.compile("[{}]").finditer(text, start):
        depth += 1 if m[0] == "{" else -1
        if depth == 0:
            return m.start()
    raise Unsupported("a body that does not end")


def _parameter(text: str) -> Variable:
    m = re.search(r"\.param\s+(.*?)([\w$]+)\s*(?:\[(\d+)\])?$", text.strip(), re.S)
    size = next(SIZE[w] for w in re.findall(r"\.(\w+)", m[1]) if w in SIZE)
    return Variable(m[2], 16, size * int(m[3] or 1))


def _declaration(text: str) -> tuple[str, Variable]:
    m = _DECLARATION.match(" ".join(text.split()))
    if m is None:
        raise Unsupported(text)
    element = SIZE[m["type"]]
    total = element
    for dim in re.findall(r"\[(\d*)\]", m["dims"]):
        total = None if dim == "" or total is None else total * int(dim)
    initial = b""
    for item in split((m["init"] or "").strip().strip("{}")):
        value = int(item[2:], 16) if item[:2] in ("0f", "0F", "0d", "0D") else int(item, 0)
        initial += (value & ((1 << 8 * element) - 1)).to_bytes(element, "little")
    return m["space"], Variable(m["name"], int(m["align"] or element), total, initial)


def _statements(body: str):
    """Instructions, labels with their colon, and the braces of scopes."""
    body = re.sub(r"^\s*\.(?:loc|file)\b[^\n]*$", "", body, flags=re.M)
    chunks = body.split(";")
    for k, chunk in enumerate(chunks):
        rest = chunk.strip()
        while m := _LEADING.match(rest):
            yield m[0].replace(" ", "")
            rest = rest[m.end() :].lstrip()
        if rest and k == len(chunks) - 1:
            raise Unsupported(rest)
        if rest:
            yield " ".join(rest.split())


def parse_body(kernel: Kernel) -> None:
    """Fills in the code; not done for a kernel that nobody runs."""
    if kernel.body is None:
        return
    body, kernel.body = kernel.body, None
    # what inline assembly declares again in a scope of its own gets a name of its own
    scopes: list[dict[str, str]] = [{}]
    for statement in _statements(body):
        if statement == "{":
            scopes.append({})
        elif statement == "}":
            scopes.pop()
        elif statement.endswith(":"):
            kernel.labels[statement[:-1]] = len(kernel.code)
        elif statement.startswith(".reg"):
            _declare_registers(statement, kernel, scopes)
        elif statement.startswith(".pragma") or not statement:
            continue
        elif statement.startswith("."):
            space, variable = _declaration(statement)
            (kernel.shared if space == "shared" else kernel.local).append(variable)
        else:
            renamed = {a: b for scope in scopes for a, b in scope.items()}
            _add_instruction(kernel, statement, renamed)
    _add_instruction(kernel, "ret", {})
    for i in kernel.code:
        if i.op[0] == "bra" and i.args[-1] not in kernel.labels:
            raise Unsupported(f"no such label: {i.text}")


def _declare_registers(statement: str, kernel: Kernel, scopes: list) -> None:
    m = re.match(r"\.reg\s*\.(\w+)\s+(.*)$", statement)
    width = "pred" if m[1] == "pred" else 16 if m[1] == "b128" else SIZE[m[1]]
    for name in split(m[2]):
        many = _REGISTERS.fullmatch(name)
        for n in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
            own = n
            if len(scopes) > 1 and n in kernel.registers:
                own = scopes[-1][n] = f"{n}@{len(kernel.registers)}"
            kernel.registers[own] = width


def _add_instruction(kernel: Kernel, statement: str, renamed: dict[str, str]) -> None:
    text = statement
    if renamed:
        text = re.sub(r"[%$\w]+", lambda m: renamed.get(m[0], m[0]), text)
    predicate, negated = None, False
    if text.startswith("@"):
        guard, text = text[1:].split(None, 1)
        predicate, negated = guard.lstrip("!"), guard.startswith("!")
    op = re.match(r"[\w.:]+", text)
    if op is None:
        raise Unsupported(statement)
    if op[0].split(".")[0] in ("call", "brx", "alloca"):
        raise Unsupported(f"a function or a computed jump: {statement}")
    args = split(text[op.end() :])
    index = len(kernel.code)
    kernel.code.append(Instruction(statement, predicate, negated, op[0].split("."), args, index))
