"""A kernel made ready to run: every instruction as a function of (wave, active threads)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import accesses, floats, integers, warps
from .flow import registers_of, unassigned_reads
from .numbers import SIZE
from .operands import writer
from .parse import Instruction, Kernel, Module, Unsupported, parse_body

PLAIN, BRANCH, EXIT, BARRIER, WARP_WIDE, ATOMIC = range(6)

_BUILDERS = {
    **{"mov": integers.build_mov, "cvta": integers.build_cvta, "setp": integers.build_setp},
    **{"selp": integers.build_selp, "cvt": floats.build_cvt, "shf": integers.build_shf},
    **{"prmt": integers.build_prmt, "lop3": integers.build_lop3, "bfe": integers.build_bfe},
    **dict.fromkeys(("popc", "clz", "brev", "bfind"), integers.build_bits),
    **dict.fromkeys(("ld", "ldu", "st"), accesses.build),
    **dict.fromkeys(("atom", "red"), accesses.build_atomic),
    **{"cp": accesses.build_copy, "shfl": warps.build_shfl, "vote": warps.build_vote},
    **{"redux": warps.build_redux, "elect": warps.build_elect},
    **{"activemask": warps.build_activemask},
    **dict.fromkeys(("fence", "membar"), warps.build_fence),
}
# hints of the cache and the clock
_NOTHING = {"prefetch", "prefetchu", "nanosleep", "discard", "applypriority"}
_BARRIERS = {
    ("bar", "sync"),
    ("barrier", "sync"),
    ("barrier", "sync", "aligned"),
    ("barrier", "cta", "sync", "aligned"),
    ("barrier", "cta", "sync"),
}


@dataclass(slots=True)
class Step:
    instruction: Instruction
    kind: int
    run: object
    target: int
    watched: set[str]  # registers to be found assigned
    assigns: set[str]  # and those that other steps watch


class Program:
    def __init__(self, module: Module, name: str):
        self.kernel: Kernel = module.kernels[name]
        parse_body(self.kernel)
        self.statics = module.statics
        self.symbols: set[str] = {v.name for v in module.statics}
        for variables in (self.kernel.params, self.kernel.shared, self.kernel.local):
            self.symbols |= {v.name for v in variables}
        watched = unassigned_reads(self.kernel)
        names = set().union(*watched.values())
        self.watched = names
        self.steps = [self._step(i, watched.get(i.index, set())) for i in self.kernel.code]
        for step in self.steps:
            if names:
                step.assigns = registers_of(step.instruction, self.kernel)[1] & names

    def _step(self, i: Instruction, watched: set[str]) -> Step:
        o = i.op[0]
        if o == "bra":
            return Step(i, BRANCH, None, self.kernel.labels[i.args[-1]], watched, set())
        if o in ("ret", "exit"):
            return Step(i, EXIT, None, 0, watched, set())
        if o in ("bar", "barrier") and "warp" not in i.op:
            # one barrier for the whole block: no other number, no count of threads
            if tuple(i.op) not in _BARRIERS or i.args != ["0"]:
                raise Unsupported(i.text)
            return Step(i, BARRIER, None, 0, watched, set())
        kind = PLAIN
        if o in ("shfl", "vote", "redux", "elect") or o == "bar":
            kind = WARP_WIDE
        elif o in ("atom", "red"):
            kind = ATOMIC
        return Step(i, kind, self._build(i), 0, watched, set())

    def _build(self, i: Instruction):
        o, t = i.op[0], i.op[-1]
        if o == "bar":
            if i.op != ["bar", "warp", "sync"]:
                raise Unsupported(i.text)
            return warps.build_warp_barrier(i, self)
        if o == "trap":
            return accesses.build_trap(i)
        if o in _NOTHING:
            return lambda w, act: None
        if o == "createpolicy":
            store = writer(i.args[0], self)
            return lambda w, act: store(w, act, np.uint64(0))
        if o in _BUILDERS:
            return _BUILDERS[o](i, self)
        if o in integers.ARITHMETIC and (t == "pred" or t[0] in "bsu" and t in SIZE and t[1] != "f"):
            return integers.build(i, self)
        if o in floats.FUNCTIONS or o in ("fma", "mad"):
            if "f" in t:
                return floats.build(i, self)
        raise Unsupported(i.text)
