"""A kernel made ready to run: every instruction as a function of (wave, active threads)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import accesses, floats, integers, warps
from .flow import in_halves, registers_of, undefinable
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
    "ldmatrix": accesses.build_matrix,
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
    # of the registers that may be undefined: read as a value, and written
    doubtful: set[str]
    settles: set[str]
    # whether the words of a 64-bit register are defined apart
    halves: bool


class Program:
    def __init__(self, module: Module, name: str):
        self.kernel: Kernel = module.kernels[name]
        parse_body(self.kernel)
        self.statics = module.statics
        self.symbols: set[str] = {v.name for v in module.statics}
        for variables in (self.kernel.params, self.kernel.shared, self.kernel.local):
            self.symbols |= {v.name for v in variables}
        self.undefinable = undefinable(self.kernel)
        self.steps = [self._step(i) for i in self.kernel.code]

    def _step(self, i: Instruction) -> Step:
        read, written = registers_of(i, self.kernel)
        doubtful = (read - {i.predicate}) & self.undefinable
        kind, run, target = self._action(i)
        settles = written & self.undefinable
        return Step(i, kind, run, target, doubtful, settles, in_halves(i))

    def _action(self, i: Instruction):
        """(kind, function, target of a branch)"""
        o = i.op[0]
        if o == "bra":
            return BRANCH, None, self.kernel.labels[i.args[-1]]
        if o in ("ret", "exit"):
            return EXIT, None, 0
        if o in ("bar", "barrier") and "warp" not in i.op:
            # one barrier for the whole block: no other number, no count of threads
            if tuple(i.op) not in _BARRIERS or i.args != ["0"]:
                raise Unsupported(i.text)
            return BARRIER, None, 0
        kind = PLAIN
        if o in ("shfl", "vote", "redux", "elect") or o == "bar":
            kind = WARP_WIDE
        elif o in ("atom", "red"):
            kind = ATOMIC
        return kind, self._build(i), 0

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
        if o in integers.ARITHMETIC and (
            t == "pred" or (t[0] in "bsu" and t in SIZE and t[1] != "f")
        ):
            return integers.build(i, self)
        if "f" in t and (o in floats.FUNCTIONS or o in ("fma", "mad")):
            return floats.build(i, self)
        raise Unsupported(i.text)
