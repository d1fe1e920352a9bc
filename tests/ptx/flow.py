"""Which registers may hold a value that nobody wrote, and what such a value may not decide.

A register that some path reads before it is written may be undefined there: half of a reduction's
lanes may be, which is harmless while only the other half is used. So, as in Valgrind's Memcheck
(Seward and Nethercote, USENIX 2005), undefinedness travels with values and is a finding where one
is stored, is an address or decides what runs. Only registers that can be undefined at all, by a
forward data flow of "written on every path", are followed while a kernel runs. A value the compiler
gave up on (of a host function in device code, say) is such a register.
"""

from __future__ import annotations

import re

from .parse import Instruction, Kernel

# these have no destination: all their operands are read
_NO_RESULT = {
    *("st", "red", "bra", "ret", "exit", "bar", "barrier", "fence", "membar", "cp", "trap"),
    *("prefetch", "prefetchu", "nanosleep", "griddepcontrol"),
}
_TOKEN = re.compile(r"[%$\w@]+")


def registers_of(instruction: Instruction, kernel: Kernel) -> tuple[set[str], set[str]]:
    """(read, written)"""

    def named(args):
        return {t for a in args for t in _TOKEN.findall(a) if t in kernel.registers}

    has_result = instruction.op[0] not in _NO_RESULT
    written = named(instruction.args[:1]) if has_result else set()
    read = named(instruction.args[1:] if has_result else instruction.args)
    if instruction.predicate is not None:
        read.add(instruction.predicate)
    return read, written


def unassigned(kernel: Kernel, uses: list) -> set[str]:
    """Registers that are read where some path from the start has not written them."""
    bit = {name: 1 << i for i, name in enumerate(kernel.registers)}
    # None: not reached yet
    before: list[int | None] = [None] * len(kernel.code)
    work = [(0, 0)]
    while work:
        at, known = work.pop()
        # straight on until nothing new is learnt
        while at < len(before):
            old = before[at]
            new = known if old is None else old & known
            if new == old:
                break
            before[at] = known = new
            i = kernel.code[at]
            if i.predicate is None:
                for name in uses[at][1]:
                    known |= bit[name]
            if i.op[0] == "bra":
                work.append((kernel.labels[i.args[-1]], known))
            if i.op[0] in ("bra", "ret", "exit", "trap") and i.predicate is None:
                break
            at += 1
    found = set()
    for at, (read, _) in enumerate(uses):
        if before[at] is not None:
            found |= {name for name in read if not before[at] & bit[name]}
    return found


def undefinable(kernel: Kernel) -> set[str]:
    """Those registers, and what is computed from them; a load gives a value of its own."""
    uses = [registers_of(i, kernel) for i in kernel.code]
    found = unassigned(kernel, uses)
    flows = [
        (read, written)
        for i, (read, written) in zip(kernel.code, uses, strict=True)
        if i.op[0] not in ("ld", "ldu", "ldmatrix", "atom")
    ]
    grows = bool(found)
    while grows:
        before = len(found)
        for read, written in flows:
            if not written <= found and read & found:
                found |= written
        grows = len(found) > before
    return found


def in_halves(i: Instruction) -> bool:
    """Whether it packs two words, unpacks them or computes with both of a pair."""
    pairs = [a for a in i.args if a.startswith("{") and a.count(",") == 1]
    return i.op[-1] == "f32x2" or (i.op == ["mov", "b64"] and len(pairs) == 1)


# where an undefined value would be seen: memory, an address, what all lanes get
SINKS = {"st", "red", "atom", "ld", "ldu", "ldmatrix", "cp", "vote", "redux", "elect", "bra"}
SINKS |= {"prefetch"}
