"""Loads, stores, atomics and asynchronous copies (PTX ISA, 9.7.9.8 to 9.7.9.25, 9.7.13)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .memory import LOCAL_WINDOW, SHARED_WINDOW, WINDOW_MASK, Fault, fetch, put
from .numbers import SIZE, UNSIGNED, dtype_of
from .operands import address, reader, space_of, vector, wide, writer
from .parse import Unsupported
from .races import WARP

# cache hints change no value; an order on a load or store is not known yet
_HINT = re.compile(
    r"(ca|cg|cs|cv|lu|wb|wt|nc|v[248]|u?ldu?|st|b\d+|[usf]\d+|weak|(global|shared|param|local|const)"
    r"(::\w+)?|L[12]::\w+|evict_\w+|no_allocate)"
)
_ORDERS = ("acq_rel", "acquire", "release", "relaxed")
_ATOMICS = {
    "add": lambda old, x, y: old + x,
    "min": lambda old, x, y: min(old, x),
    "max": lambda old, x, y: max(old, x),
    "and": lambda old, x, y: old & x,
    "or": lambda old, x, y: old | x,
    "xor": lambda old, x, y: old ^ x,
    "exch": lambda old, x, y: x,
    "cas": lambda old, x, y: y if old == x else old,
}


def locate(w, space: str, given, lanes, size: int, writes: bool, text: str):
    """(addresses, regions) in this process of the lanes' addresses."""
    a = np.broadcast_to(given, (w.n,))[lanes]
    if space == "shared":
        a = _in_window(a, w.shared_base[lanes], w.machine.shared_size, size, text)
    elif space == "local":
        a = _in_window(a, w.local_base[lanes], w.machine.local_size, size, text)
    elif space == "generic" and (a & WINDOW_MASK).any():
        a = np.array(a)
        for bit, base, limit in (
            (SHARED_WINDOW, w.shared_base, w.machine.shared_size),
            (LOCAL_WINDOW, w.local_base, w.machine.local_size),
        ):
            inside = (a & bit) != 0
            offsets = a[inside] & ~np.int64(bit)
            a[inside] = _in_window(offsets, base[lanes][inside], limit, size, text)
    return a, w.machine.memory.locate(a, size, writes, text)


def _in_window(offsets, base, limit: int, size: int, text: str):
    outside = (offsets < 0) | (offsets + size > limit)
    if outside.any():
        at = int(offsets[outside][0])
        raise Fault(f"out of bounds: {size} bytes at {at} of {limit} of its block: {text}")
    return base + offsets


def lanes_of(w, act):
    return w.everyone if act is None else np.flatnonzero(act)


def load(w, act, space: str, given, size: int, count: int, i) -> list:
    """``count`` values of ``size`` bytes a thread."""
    lanes = lanes_of(w, act)
    memory, total = w.machine.memory, size * count
    a, regions = locate(w, space, given, lanes, total, False, i.text)
    granules, which = memory.granules_of(regions, a, total)
    if len(granules):
        fresh = ~memory.initialised[granules]
        if fresh.any():
            name = memory.name_of(int(granules[fresh][0]))
            w.machine.note("uninitialised", f"read of {name}: {i.text}")
        if w.machine.history is not None:
            g = w.gid[lanes[which]]
            w.machine.history.read(granules, g, i, w.machine.program.kernel.code)
    values = []
    for k in range(count):
        got = fetch(a + k * size, size)
        if act is None:
            values.append(got)
        else:
            x = np.zeros(w.n, UNSIGNED[size])
            x[lanes] = got
            values.append(x)
    return values


def store(w, act, space: str, given, size: int, values, i) -> None:
    lanes = lanes_of(w, act)
    total = size * len(values)
    a, regions = locate(w, space, given, lanes, total, True, i.text)
    _wrote(w, regions, a, total, lanes, i)
    for k, v in enumerate(values):
        put(a + k * size, size, np.broadcast_to(v, (w.n,))[lanes])


def _wrote(w, regions, a, size: int, lanes, i) -> None:
    memory = w.machine.memory
    granules, which = memory.granules_of(regions, a, size)
    if len(granules):
        memory.initialised[granules] = True
        if w.machine.history is not None:
            g = w.gid[lanes[which]]
            w.machine.history.write(granules, g, i, w.machine.program.kernel.code)


def build(i, program):
    """ld and st, of one value or a vector."""
    op, t = i.op, i.op[-1]
    for part in op[1:]:
        if not _HINT.fullmatch(part):
            raise Unsupported(f"{part} of {i.text}")
    if t not in SIZE:
        raise Unsupported(i.text)
    loads, size = op[0] != "st", SIZE[t]
    place, held = (i.args[1], i.args[0]) if loads else (i.args[0], i.args[1])
    names, where, space = vector(held), address(place, program), space_of(op)
    expected = next((int(x[1:]) for x in op if re.fullmatch(r"v\d", x)), 1)
    if len(names) != expected:
        raise Unsupported(i.text)
    if not loads:
        gets = [reader(n, f"b{8 * size}", program) for n in names]
        return lambda w, act: store(w, act, space, where(w), size, [g(w) for g in gets], i)
    stores, dtype = [writer(n, program) for n in names], dtype_of(t)

    def run(w, act):
        for keep, v in zip(stores, load(w, act, space, where(w), size, expected, i), strict=True):
            keep(w, act, v.view(dtype))

    def run_param(w, act):
        # the same for every thread, and nothing to check but the bounds
        a = where(w)
        for k, keep in enumerate(stores):
            keep(w, act, w.machine.parameter(int(a) + k * size, size, i.text).view(dtype))

    constant = space == "param" and not place.strip("[] ").startswith("%")
    return run_param if constant else run


def build_matrix(i, program):
    """ldmatrix: every register takes 8 rows of 16 bytes, each at the address of one lane."""
    count = {"x1": 1, "x2": 2, "x4": 4}.get(i.op[4])
    names, where = vector(i.args[0]), address(i.args[1], program)
    known = i.op[1:4] == ["sync", "aligned", "m8n8"] and i.op[-1] == "b16"
    if not known or len(names) != count or set(i.op[5:-1]) - {"trans", "shared", "shared::cta"}:
        raise Unsupported(i.text)
    space = space_of(i.op)
    stores = [writer(n, program) for n in names]

    def run(w, act):
        on = np.ones(w.n, bool) if act is None else act
        whole = on.reshape(-1, WARP)
        if (whole.any(1) != whole.all(1)).any():
            raise Fault(f"a part of a warp only: {i.text}")
        rows = np.stack(load(w, on & (w.lane < 8 * count), space, where(w), 4, 4, i), 1)
        halves = rows.view(np.uint16).reshape(-1, WARP, 8)
        for k, keep in enumerate(stores):
            matrix = halves[:, 8 * k : 8 * k + 8]
            if "trans" in i.op:
                matrix = matrix.swapaxes(1, 2)
            keep(w, act, np.ascontiguousarray(matrix).view(np.uint32).reshape(-1))

    return run


def build_atomic(i, program):
    """atom and red: one thread after the other, in an order drawn anew each time."""
    op, t = i.op, i.op[-1]
    what = next((x for x in op[1:] if x in _ATOMICS), None)
    unknown = set(op[1:-1]) - {*_ATOMICS, *_ORDERS, "global", "shared", "gpu", "sys", "cta"}
    unknown = {x for x in unknown if not x.startswith("L2::") and x != "shared::cta"}
    if what is None or unknown:
        raise Unsupported(i.text)
    returns = op[0] == "atom"
    keep = writer(i.args[0], program) if returns else None
    rest = i.args[1:] if returns else i.args
    where, space, size = address(rest[0], program), space_of(op), SIZE[t]
    x = reader(rest[1], t, program)
    y = reader(rest[2], t, program) if what == "cas" else None
    order = next((s for s in _ORDERS if s in op), "relaxed")
    change, dtype = _ATOMICS[what], np.dtype(dtype_of(t))
    if dtype.kind == "f" and t == "f16":
        raise Unsupported(i.text)

    def run(w, act):
        machine, lanes = w.machine, lanes_of(w, act)
        if "cta" in op and space != "shared":
            machine.note("scope", f"an atomic only for its own block: {i.text}")
        a, regions = locate(w, space, where(w), lanes, size, True, i.text)
        granules, which = machine.memory.granules_of(regions, a, size)
        if len(granules) and not machine.memory.initialised[granules].all():
            machine.note("uninitialised", f"atomic: {i.text}")
        first, second = wide(w, x(w)), wide(w, y(w)) if y else None
        old = np.zeros(w.n, dtype)
        turns = list(range(len(lanes)))
        machine.random.shuffle(turns)
        for k in turns:
            lane, at = lanes[k], a[k : k + 1]
            if machine.history is not None:
                mine, g = granules[which == k], w.gid[lane : lane + 1]
                everyone = np.repeat(g, len(mine))
                code = program.kernel.code
                machine.history.write(mine, everyone, i, code, atomic=True)
                machine.clocks.atomic(int(g[0]), int(at[0]), order)
            current = fetch(at, size).view(dtype)[0]
            old[lane] = current
            new = change(current, first[lane], second[lane] if y else None)
            put(at, size, np.array([new], dtype).view(UNSIGNED[size]))
        if keep:
            keep(w, act, old)

    return run


@dataclass
class Copy:
    """cp.async of one instruction: what its lanes copy, until they wait for it."""

    lanes: np.ndarray
    groups: np.ndarray
    to: np.ndarray
    data: np.ndarray  # [lanes, words]
    instruction: object


def build_copy(i, program):
    """cp.async, its groups and waits: until then the destination is undefined."""
    if i.op[1] != "async" or "bulk" in i.op or "mbarrier" in i.op:
        raise Unsupported(i.text)
    if "commit_group" in i.op:

        def commit(w, act):
            w.groups[lanes_of(w, act)] += 1

        return commit
    if "wait_group" in i.op or "wait_all" in i.op:
        left = int(i.args[0], 0) if "wait_group" in i.op else None
        return lambda w, act: _wait(w, act, left)
    to, of = address(i.args[0], program), address(i.args[1], program)
    size = int(i.args[2], 0)
    hinted = any("cache_hint" in part for part in i.op)
    extra = i.args[3:-1] if hinted else i.args[3:]
    copied = reader(extra[0], "u32", program) if extra else None

    def run(w, act):
        lanes = lanes_of(w, act)
        count = wide(w, copied(w)) if copied else np.full(w.n, size, np.uint32)
        on = np.zeros(w.n, bool)
        on[lanes] = True
        reads = on & (count > 0)
        if (count[reads] != size).any():
            raise Unsupported(f"a part of {i.text}")
        data = np.zeros((w.n, size // 4), np.uint32)
        if reads.any():
            given = np.broadcast_to(of(w), (w.n,))
            if (given[reads] % size).any():
                raise Fault(f"misaligned: address % {size}: {i.text}")
            for k, v in enumerate(load(w, reads, "global", given, 4, size // 4, i)):
                data[:, k] = v
        given = np.broadcast_to(to(w), (w.n,))
        a, regions = locate(w, "shared", given, lanes, size, True, i.text)
        granules, _ = w.machine.memory.granules_of(regions, a, size)
        w.machine.memory.initialised[granules] = False
        w.copies.append(Copy(lanes, w.groups[lanes].copy(), given[lanes], data[lanes], i))

    return run


def _wait(w, act, left: int | None) -> None:
    on = np.zeros(w.n, bool)
    on[lanes_of(w, act)] = True
    rest = []
    for c in w.copies:
        done = on[c.lanes]
        if left is not None:
            done = done & (c.groups < w.groups[c.lanes] - left)
        if done.any():
            mask, to = np.zeros(w.n, bool), np.zeros(w.n, np.int64)
            mask[c.lanes[done]] = True
            to[c.lanes] = c.to
            values = []
            for k in range(c.data.shape[1]):
                x = np.zeros(w.n, np.uint32)
                x[c.lanes] = c.data[:, k]
                values.append(x)
            store(w, mask, "shared", to, 4, values, c.instruction)
        if not done.all():
            k = ~done
            rest.append(Copy(c.lanes[k], c.groups[k], c.to[k], c.data[k], c.instruction))
    w.copies = rest


def build_trap(i):
    def run(w, act):
        raise Fault(f"trap: {i.text}")

    return run
