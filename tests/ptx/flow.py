"""Which reads of a register may come before any write to it.

A forward data flow of "assigned on every path": in a kernel that is whole, that is nearly every
read, and only the others are watched while it runs. A value the compiler gave up on (a call of a
host function from device code, say) is such a register.
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


def unassigned_reads(kernel: Kernel) -> dict[int, set[str]]:
    """{index of an instruction: registers it reads that some path to it does not write}"""
    bit = {name: 1 << i for i, name in enumerate(kernel.registers)}
    uses = [registers_of(i, kernel) for i in kernel.code]
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
    found = {}
    for i, (read, _) in enumerate(uses):
        names = {n for n in read if before[i] is not None and not before[i] & bit[n]}
        if names:
            found[i] = names
    return found
