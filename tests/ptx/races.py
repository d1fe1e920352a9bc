"""Data races, by vector clocks, in the order that PTX itself gives.

Two accesses of one place conflict unless both read or both are atomic (PTX ISA, 8.7 "morally
strong"); they race unless causality orders them (8.9.5 and Lustig et al., "A Formal Analysis of the
NVIDIA PTX Memory Consistency Model", ASPLOS 2019, section 3). What orders: program order, bar.sync,
bar.warp.sync, and release and acquire patterns: atom.acq_rel, or a fence before a relaxed atomic
that another thread's atomic reads, followed by a fence there. Shuffles and votes order nothing.

A thread's clock counts its synchronisations. What it knows of others is kept in three parts:
 ``block[x]``   the clock of x at the last barrier of its block, known to the whole block;
 ``warp[g, l]`` the clock of lane l of g's warp;
 ``far[g]``     a row of ``rows``: clocks of the whole grid, learnt by acquiring.
As in FastTrack (Flanagan and Freund, PLDI 2009) a granule keeps the clock of its last write; of its
reads since, each warp's latest instruction with its first and its last lane.
"""

from __future__ import annotations

import numpy as np

WARP = 32


class Clocks:
    def __init__(self, threads: int, block_size: int):
        self.block_size = block_size
        self.clock = np.ones(threads, np.int32)
        self.block = np.zeros(threads, np.int32)
        self.warp = np.zeros((threads, WARP), np.int32)
        self.far = np.zeros(threads, np.int64)
        self.rows = [np.zeros(threads, np.int32)]
        self._joined: dict[tuple, int] = {}
        self._at_fence: dict[int, np.ndarray] = {}
        self._pending: dict[int, np.ndarray] = {}
        self._released: dict[int, np.ndarray] = {}

    def knows(self, g, other, clock):
        """Whether what ``other`` did at ``clock`` comes before what ``g`` does now."""
        known = g == other
        same_block = g // self.block_size == other // self.block_size
        known |= same_block & (clock <= self.block[other])
        same_warp = g // WARP == other // WARP
        known |= same_warp & (clock <= self.warp[g, other % WARP])
        rest = np.flatnonzero(~known & (self.far[g] > 0))
        for row in np.unique(self.far[g[rest]]):
            mine = rest[self.far[g[rest]] == row]
            known[mine] = clock[mine] <= self.rows[row][other[mine]]
        return known

    def _join_far(self, g) -> None:
        ids = np.unique(self.far[g])
        if len(ids) < 2:
            return
        key = tuple(ids.tolist())
        if key not in self._joined:
            self._joined[key] = self._new_row(np.max([self.rows[i] for i in key], axis=0))
        self.far[g] = self._joined[key]

    def _new_row(self, row) -> int:
        self.rows.append(row)
        return len(self.rows) - 1

    def barrier(self, g) -> None:
        """bar.sync: ``g`` are the threads that met, of one or more whole blocks."""
        self.block[g] = self.clock[g]
        if self.far[g].any():
            for b in np.unique(g // self.block_size):
                self._join_far(g[g // self.block_size == b])
        self.clock[g] += 1

    def warp_sync(self, g) -> None:
        """bar.warp.sync among the given threads of each warp."""
        self.warp[g, g % WARP] = self.clock[g]
        for w in np.unique(g // WARP):
            members = g[g // WARP == w]
            self.warp[members] = self.warp[members].max(0)
            self._join_far(members)
        self.clock[g] += 1

    def _snapshot(self, g: int):
        known = self.rows[self.far[g]].copy()
        start = g // self.block_size * self.block_size
        mine = slice(start, start + self.block_size)
        known[mine] = np.maximum(known[mine], self.block[mine])
        lanes = slice(g // WARP * WARP, g // WARP * WARP + WARP)
        known[lanes] = np.maximum(known[lanes], self.warp[g][: len(known[lanes])])
        known[g] = self.clock[g]
        return known

    def fence(self, g) -> None:
        for x in g.tolist():
            if x in self._pending:
                row = np.maximum(self.rows[self.far[x]], self._pending.pop(x))
                self.far[x] = self._new_row(row)
            self._at_fence[x] = self._snapshot(x)
        self.clock[g] += 1

    def atomic(self, g: int, address: int, order: str) -> None:
        """A read-modify-write: it reads the one before it, so releases go on through it."""
        released = order in ("release", "acq_rel")
        given = self._snapshot(g) if released else self._at_fence.get(g)
        got = self._released.get(address)
        if got is not None:
            if order in ("acquire", "acq_rel"):
                self.far[g] = self._new_row(np.maximum(self.rows[self.far[g]], got))
            else:
                old = self._pending.get(g)
                self._pending[g] = got if old is None else np.maximum(old, got)
        if given is not None:
            self._released[address] = given if got is None else np.maximum(got, given)
        self.clock[g] += 1


class History:
    """The last write to every granule, and the reads since."""

    def __init__(self, memory, clocks: Clocks, threads: int, note):
        self.memory, self.clocks, self.note = memory, clocks, note
        granules = memory.granules
        self.writer = np.full(granules, -1, np.int32)
        self.write_clock = np.zeros(granules, np.int32)
        self.write_atomic = np.zeros(granules, bool)
        self.write_at = np.zeros(granules, np.int32)
        self.read_at = np.zeros(granules, np.int32)
        # columns: the warps of the grid; nothing is touched before it is used
        self.read_clock = np.zeros((granules, -(-threads // WARP), 2), np.int32)
        self.read_lane = np.zeros(self.read_clock.shape, np.uint8)
        self.was_read = np.zeros(granules, bool)

    def _report(self, what: str, granule: int, instruction, other: int, code) -> None:
        where = self.memory.name_of(granule)
        self.note("race", f"{what} of {where}: {instruction.text}  <-- {code[other].text}")

    def _after_write(self, kind: str, granules, g, instruction, code, atomic: bool) -> None:
        writer = self.writer[granules]
        suspects = (writer >= 0) & (writer != g)
        if atomic:
            suspects &= ~self.write_atomic[granules]
        i = np.flatnonzero(suspects)
        if len(i) == 0:
            return
        known = self.clocks.knows(g[i], writer[i], self.write_clock[granules[i]])
        if not known.all():
            at = int(granules[i[~known][0]])
            before = "atomic" if self.write_atomic[at] else "write"
            what = f"{kind} after {before}"
            self._report(what, at, instruction, int(self.write_at[at]), code)

    def _after_reads(self, kind: str, granules, g, instruction, code) -> None:
        read = np.flatnonzero(self.was_read[granules])
        if len(read) == 0:
            return
        clocks = self.read_clock[granules[read]]
        i, column, slot = np.nonzero(clocks)
        reader = column * WARP + self.read_lane[granules[read[i]], column, slot]
        known = self.clocks.knows(g[read[i]], reader, clocks[i, column, slot])
        if not known.all():
            at = int(granules[read[i[~known][0]]])
            self._report(f"{kind} after read", at, instruction, int(self.read_at[at]), code)

    def read(self, granules, g, instruction, code) -> None:
        self._after_write("read", granules, g, instruction, code, atomic=False)
        now, column, lane = self.clocks.clock[g], g // WARP, g % WARP
        # of several lanes the last one stays in slot 0 and the first in slot 1
        self.read_clock[granules, column, 0] = now
        self.read_lane[granules, column, 0] = lane
        self.read_clock[granules[::-1], column[::-1], 1] = now[::-1]
        self.read_lane[granules[::-1], column[::-1], 1] = lane[::-1]
        self.was_read[granules] = True
        self.read_at[granules] = instruction.index

    def write(self, granules, g, instruction, code, *, atomic=False) -> None:
        kind = "atomic" if atomic else "write"
        if not atomic and len(granules) > 1:
            _, first, counts = np.unique(granules, return_index=True, return_counts=True)
            if (counts > 1).any():
                name = self.memory.name_of(int(granules[first[counts > 1][0]]))
                self.note("same store", f"several lanes store to one place of {name}: "
                          f"{instruction.text}")  # fmt: skip
        self._after_write(kind, granules, g, instruction, code, atomic)
        self._after_reads(kind, granules, g, instruction, code)
        self.writer[granules] = g
        self.write_clock[granules] = self.clocks.clock[g]
        self.write_atomic[granules] = atomic
        self.write_at[granules] = instruction.index
        self.was_read[granules] = False
        self.read_clock[granules] = 0
