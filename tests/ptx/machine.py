"""Runs a kernel: all blocks at once, lowest program counter first, so that threads reconverge.

A wave is some blocks of the grid whose threads are elements of the same arrays. Blocks interact
only by atomics; before each one a random half of the blocks that are there goes first, so that
seeds are schedules. ``.sync`` instructions wait for the lanes their mask names and a barrier for
its block.
"""

from __future__ import annotations

import ctypes
import functools
import random

import numpy as np

from .flow import SINKS
from .memory import Fault, Memory, Region
from .numbers import SIZE, UNSIGNED
from .operands import reader, vector
from .program import ATOMIC, BARRIER, BRANCH, EXIT, WARP_WIDE, Program
from .races import WARP, Clocks, History

# threads of a wave; more make arrays that leave the cache
WAVE = 8192
# steps of one launch before it is taken not to end
LIMIT = 3_000_000


class Registers(dict):
    """Arrays that come to be when they are first used."""

    def __init__(self, kernel, n: int):
        super().__init__()
        self.kernel, self.n = kernel, n

    def __missing__(self, name: str):
        width = self.kernel.registers[name]
        dtype = np.bool_ if width == "pred" else UNSIGNED[width]
        self[name] = np.zeros(self.n, dtype)
        return self[name]


class Wave:
    def __init__(self, machine, blocks: list[int]):
        self.machine = machine
        threads, padded = machine.block, machine.padded
        self.n = len(blocks) * padded
        self.everyone = np.arange(self.n)
        within = np.tile(np.arange(padded), len(blocks))
        self.tid = within.astype(np.uint32)
        self.lane = self.tid % np.uint32(WARP)
        self.block = np.repeat(np.array(blocks), padded)
        self.gid = self.block * padded + within
        self.registers = Registers(machine.program.kernel, self.n)
        # of a 64-bit register the lower word
        names, widths = machine.program.undefinable, machine.program.kernel.registers
        self.defined = {name: np.zeros(self.n, bool) for name in names}
        self.upper = {name: np.zeros(self.n, bool) for name in names if widths[name] == 8}
        self.shuffled_from = None
        self.pc = np.zeros(self.n, np.int64)
        self.alive = within < threads
        self.parked, self.blocked, self.delayed = (np.zeros(self.n, bool) for _ in range(3))
        self.shared_base = machine.shared_base + self.block * machine.shared_stride
        self.local_base = machine.local_base + self.gid * machine.local_size
        self.copies, self.groups = [], np.zeros(self.n, np.int64)

    def symbol(self, name: str) -> int:
        return self.machine.symbols[name]

    def words(self, name: str):
        """Whether the lower and the upper word are defined; a narrower register is both."""
        lower = self.defined.get(name, np.True_)
        return lower, self.upper.get(name, lower)

    def known(self, name: str):
        lower, upper = self.words(name)
        return lower & upper

    def settle(self, name: str, act, lower, upper) -> None:
        where = True if act is None else act
        for held, known in ((self.defined, lower), (self.upper, upper)):
            if name in held:
                np.copyto(held[name], known, where=where)

    def special(self, name: str):
        lane = self.lane.astype(np.uint64)
        below, own = (np.uint64(1) << lane) - np.uint64(1), np.uint64(1) << lane
        rest = ~(below | own) & np.uint64(0xFFFFFFFF)
        if name.endswith((".y", ".z")):
            return np.uint32(1 if "n" in name else 0)
        return {
            "%tid.x": self.tid,
            "%ntid.x": np.uint32(self.machine.block),
            "%ctaid.x": self.block,
            "%nctaid.x": np.uint32(self.machine.grid),
            "%laneid": self.lane,
            "%warpid": self.tid // np.uint32(WARP),
            "%lanemask_lt": below,
            "%lanemask_le": below | own,
            "%lanemask_eq": own,
            "%lanemask_gt": rest,
            "%lanemask_ge": rest | own,
        }.get(name, np.uint32(0))


class Machine:
    """One launch: the bytes of each parameter, and ``regions``, the memory it may touch."""

    def __init__(
        self, program: Program, *, grid, block, params, regions, shared_bytes=0, seed=0, races=True
    ):
        self.program, self.grid, self.block = program, grid, block
        self.padded = -(-block // WARP) * WARP
        kernel = program.kernel
        if kernel.block_limit is not None and block > kernel.block_limit:
            raise Fault(f"{block} threads a block, {kernel.name} takes {kernel.block_limit}")
        self.random = random.Random(seed)
        self.findings: dict[tuple[str, str], int] = {}
        self.executed = 0
        self._kept = []
        self.symbols: dict[str, int] = {}
        regions = list(regions)
        for v in program.statics:
            self.symbols[v.name] = base = self._allocate(v.size, v.initial)
            regions.append(Region(v.name, base, v.size, writable=True))
        self._params = {}
        for v, value in zip(kernel.params, params, strict=True):
            if len(value) != v.size:
                raise ValueError(f"{v.name}: {len(value)} bytes instead of {v.size}")
            self.symbols[v.name] = base = self._allocate(v.size, value)
            self._params[base] = value
            regions.append(Region("parameters", base, v.size))
        self.shared_size = self._lay_out(kernel.shared, shared_bytes)
        self.local_size = -(-self._lay_out(kernel.local, 0) // 16) * 16
        self.shared_stride = -(-self.shared_size // 16) * 16 + 16
        self.shared_base = self._allocate(self.shared_stride * grid)
        grain = min([4, *(SIZE[i.op[-1]] for i in kernel.code if _touches_shared(i))])
        for b in range(grid if self.shared_size else 0):
            base = self.shared_base + b * self.shared_stride
            size = -(-self.shared_size // grain) * grain
            regions.append(Region("shared memory", base, size, True, False, True, grain))
        threads = grid * self.padded
        self.local_base = self._allocate(self.local_size * threads)
        if self.local_size:
            regions.append(
                Region("local memory", self.local_base, self.local_size * threads, writable=True)
            )
        self.memory = Memory(regions)
        # what would take more than two gigabytes is executed without the history of its accesses
        races = races and 10 * self.memory.granules * threads // WARP < 2 << 30
        self.clocks = Clocks(threads, self.padded) if races else None
        self.history = History(self.memory, self.clocks, threads, self.note) if races else None

    def _allocate(self, size: int, value: bytes = b"") -> int:
        buffer = ctypes.create_string_buffer(max(size, 1) + 32)
        base = -(-ctypes.addressof(buffer) // 16) * 16
        ctypes.memmove(base, bytes(value), min(len(value), size))
        self._kept.append(buffer)
        return base

    def _lay_out(self, variables, dynamic: int) -> int:
        at = 0
        for v in variables:
            at = -(-at // v.align) * v.align
            self.symbols[v.name] = at
            at += dynamic if v.size is None else v.size
        return at

    def parameter(self, address: int, size: int, text: str):
        for base, value in self._params.items():
            if base <= address and address + size <= base + len(value):
                raw = value[address - base : address - base + size]
                return np.frombuffer(raw, UNSIGNED[size])[0]
        raise Fault(f"out of bounds of the parameters: {text}")

    def note(self, kind: str, message: str) -> None:
        key = kind, message
        self.findings[key] = self.findings.get(key, 0) + 1

    def run(self) -> dict[tuple[str, str], int]:
        order = list(range(self.grid))
        self.random.shuffle(order)
        count = max(WAVE // self.padded, 1)
        with np.errstate(all="ignore"):
            for first in range(0, self.grid, count):
                self._run_wave(Wave(self, sorted(order[first : first + count])))
        for left in self.memory.never_written():
            self.note("never written", left)
        return self.findings

    def _run_wave(self, w: Wave) -> None:
        while True:
            runnable = w.alive & ~w.parked & ~w.blocked & ~w.delayed
            if runnable.any():
                self._run_lowest(w, runnable)
            elif w.delayed.any():
                w.delayed[:] = False
            elif w.alive.any():
                self._release_barriers(w)
            else:
                return

    def _release_barriers(self, w: Wave) -> None:
        shape = (-1, self.padded)
        arrived = (w.parked | ~w.alive).reshape(shape).all(1)
        met = w.parked & np.repeat(arrived, self.padded)
        if not met.any():
            waiting = w.alive & w.blocked
            at = {self.program.kernel.code[p].text for p in set(w.pc[waiting].tolist())}
            raise Fault(f"lanes that a mask names never arrive at: {sorted(at)}")
        pcs = np.where(met, w.pc, -1).reshape(shape)
        lowest = np.where(met.reshape(shape), pcs, 1 << 60).min(1)
        if ((pcs.max(1) != lowest) & (pcs.max(1) >= 0)).any():
            texts = {int(p) - 1 for p in pcs[pcs >= 0]}
            self.note("barrier", f"threads of a block met at different ones: {len(texts)}")
        if self.clocks is not None:
            self.clocks.barrier(w.gid[met])
        w.parked &= ~met

    def _run_lowest(self, w: Wave, runnable) -> None:
        """The threads at the lowest instruction go on until they meet others or part."""
        pcs = w.pc[runnable]
        pc = int(pcs.min())
        mask = w.alive & ~w.parked & ~w.delayed & (w.pc == pc)
        ahead = w.pc[w.alive & ~w.parked & ~w.delayed & (w.pc > pc)]
        stop = int(ahead.min()) if len(ahead) else -1
        w.blocked &= ~mask
        full = bool(mask.all())
        while True:
            step = self.program.steps[pc]
            i, kind = step.instruction, step.kind
            act = None if full else mask
            if i.predicate is not None:
                if i.predicate in w.defined:
                    self._require(w, step, w.defined[i.predicate], act)
                p = w.registers[i.predicate]
                act = mask & (~p if i.negated else p)
                if not act.any():
                    pc += 1
                    if kind == BRANCH or pc == stop:
                        w.pc[mask] = pc
                        return
                    continue
            i.hits += 1
            self.executed += 1
            if self.executed > LIMIT:
                raise Fault(f"no end after {LIMIT} steps: {i.text}")
            if kind == BRANCH:
                w.pc[mask] = pc + 1
                w.pc[mask if act is None else act] = step.target
                return
            if kind == EXIT:
                w.pc[mask] = pc + 1
                w.alive &= ~(mask if act is None else act)
                return
            if kind == BARRIER:
                w.pc[mask] = pc + 1
                w.parked |= mask if act is None else act
                return
            if kind == WARP_WIDE:
                ready = self._complete_warps(w, step, mask if act is None else act)
                if ready is not None:
                    active = mask if act is None else act
                    w.pc[mask] = pc + 1
                    w.pc[active & ~ready] = pc
                    w.blocked |= active & ~ready
                    if (active & ready).any():
                        self._execute(w, step, active & ready)
                    return
            if kind == ATOMIC and self._delay_some(w, mask, pc):
                return
            self._execute(w, step, act)
            pc += 1
            if pc == stop:
                w.pc[mask] = pc
                return

    def _execute(self, w: Wave, step, act) -> None:
        if not step.doubtful and not step.settles:
            step.run(w, act)
            return
        i = step.instruction
        if step.halves:
            self._execute_halves(w, step, act)
            return
        known = np.ones(w.n, bool)
        for name in step.doubtful:
            known &= w.known(name)
        if i.op[0] in SINKS:
            self._require(w, step, known, act)
            known[:] = True
        elif i.op[0] == "selp" or i.op[-1] == "pred":
            known = self._chosen(w, i, known)
        step.run(w, act)
        if i.op[0] == "shfl":
            known = known[w.shuffled_from]
        for name in step.settles:
            w.settle(name, act, known, known)

    def _execute_halves(self, w: Wave, step, act) -> None:
        i = step.instruction
        to, *of = (vector(a) for a in i.args)
        if i.op[-1] == "f32x2":
            lower, upper = (
                functools.reduce(np.logical_and, words)
                for words in zip(*(w.words(a) for (a,) in of), strict=True)
            )
        elif len(to) == 1:
            lower, upper = (w.known(a) for a in of[0])
        else:
            lower, upper = w.words(of[0][0])
        step.run(w, act)
        if len(to) == 1:
            w.settle(to[0], act, lower, upper)
        else:
            w.settle(to[0], act, lower, lower)
            w.settle(to[1], act, upper, upper)

    def _chosen(self, w: Wave, i, known):
        """Defined although an operand is not: the one that selp or a false ``and`` leaves out."""

        of = w.known

        if i.op[0] == "selp":
            a, b, p = i.args[1:]
            return of(p) & np.where(w.registers[p], of(a), of(b))
        if i.op[0] in ("and", "or") and all(a in w.registers for a in i.args[1:]):
            a, b = i.args[1:]
            decides = i.op[0] == "or"
            return (
                known
                | (of(a) & (w.registers[a] == decides))
                | (of(b) & (w.registers[b] == decides))
            )
        return known

    def _require(self, w: Wave, step, known, act) -> None:
        if not (known if act is None else known[act]).all():
            self.note("register", f"an undefined value decides: {step.instruction.text}")

    def _delay_some(self, w: Wave, mask, pc: int) -> bool:
        """True: of the blocks at this atomic some were held back, and all are to be chosen anew."""
        if w.delayed.any():
            if self.random.random() < 0.5:
                w.delayed[:] = False
            return False
        blocks = np.unique(w.block[mask])
        if len(blocks) == 1:
            return False
        late = [b for b in blocks.tolist() if self.random.random() < 0.5]
        if not late or len(late) == len(blocks):
            return False
        w.pc[mask] = pc
        w.delayed |= mask & np.isin(w.block, late)
        return True

    def _complete_warps(self, w: Wave, step, act):
        """None if every mask is complete; else whose warp is."""
        text = step.instruction.args[-1]
        warps = act.reshape(-1, WARP)
        whole = warps.all(1)
        if text in ("-1", "0xffffffff") and (whole | ~warps.any(1)).all():
            return None
        named = np.broadcast_to(reader(text, "b32", self.program)(w), (w.n,)).astype(np.uint64)
        present = (warps * (np.uint64(1) << np.arange(WARP, dtype=np.uint64))).sum(1)
        present = np.repeat(present.astype(np.uint64), WARP)
        own = np.uint64(1) << w.lane.astype(np.uint64)
        if (act & ((named & own) == 0)).any():
            raise Fault(f"a lane is not in its own mask: {step.instruction.text}")
        ready = ~act | ((named & present) == named)
        return None if ready.all() else ready


def _touches_shared(i) -> bool:
    return i.op[0] in ("ld", "st") and any(x.startswith("shared") for x in i.op)


__all__ = ["Fault", "Machine", "Program", "Region"]
