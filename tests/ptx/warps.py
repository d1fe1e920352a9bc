"""What the lanes of a warp do together (PTX ISA, 9.7.9.6 shfl, 9.7.13), and fences."""

from __future__ import annotations

from functools import partial

import numpy as np

from . import floats
from .operands import reader, wide, writer
from .parse import Unsupported
from .races import WARP

_REDUCE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_BITS = np.uint64(1) << np.arange(WARP, dtype=np.uint64)


def on_of(w, act):
    return np.ones(w.n, bool) if act is None else act


def ballot(flags):
    """For every lane the bits of its warp's flags."""
    bits = (flags.reshape(-1, WARP) * _BITS).sum(1).astype(np.uint32)
    return np.repeat(bits, WARP)


def build_shfl(i, program):
    if i.op[1] != "sync":
        raise Unsupported(i.text)
    mode = i.op[2]
    stores = [writer(x, program) for x in i.args[0].split("|")]
    a, s, c = (
        reader(x, t, program) for x, t in zip(i.args[1:4], ("b32", "u32", "u32"), strict=True)
    )

    def run(w, act):
        on, x = on_of(w, act), wide(w, a(w))
        lane = w.lane.astype(np.int64)
        b, bounds = (np.asarray(v).astype(np.int64) for v in (s(w), c(w)))
        b = b & 31
        segment, clamp = (bounds >> 8) & 31, bounds & 31
        low = lane & segment
        last = low | (clamp & ~segment & 31)
        source = {
            "up": lane - b,
            "down": lane + b,
            "bfly": lane ^ b,
            "idx": low | (b & ~segment & 31),
        }[mode]
        inside = source >= last if mode == "up" else source <= last
        source = np.where(inside, source, lane)
        at = np.arange(w.n) - lane + source
        if not on[at[on]].all():
            w.machine.note("shuffle", f"from a lane that takes no part: {i.text}")
        w.shuffled_from = at
        stores[0](w, act, x[at])
        if len(stores) > 1:
            stores[1](w, act, inside)

    return run


def build_vote(i, program):
    if i.op[1] != "sync" or i.op[2] not in ("ballot", "any", "all"):
        raise Unsupported(i.text)
    mode, store = i.op[2], writer(i.args[0], program)
    p, mask = reader(i.args[1], "pred", program), reader(i.args[2], "b32", program)

    def run(w, act):
        named = np.asarray(mask(w))
        bits = ballot(wide(w, p(w)) & on_of(w, act)) & named
        store(w, act, {"ballot": bits, "any": bits != 0, "all": bits == named}[mode])

    return run


def build_redux(i, program):
    t = i.op[-1]
    of_floats = t == "f32" and i.op[2] in ("min", "max") and set(i.op[3:-1]) <= {"NaN"}
    if i.op[1] != "sync" or i.op[2] not in _REDUCE or not (of_floats or t[0] in "bsu"):
        raise Unsupported(i.text)
    function = _REDUCE[i.op[2]].reduce
    if of_floats:
        function = partial(floats.reduce, i.op)
    a, store = reader(i.args[1], t, program), writer(i.args[0], program)

    def run(w, act):
        x, on = wide(w, a(w)), on_of(w, act)
        r = np.zeros(w.n, x.dtype)
        for first in range(0, w.n, WARP):
            here = on[first : first + WARP]
            if here.any():
                r[first : first + WARP] = function(x[first : first + WARP][here])
        store(w, act, r)

    return run


def build_elect(i, program):
    _, leads = i.args[0].split("|")
    store = writer(leads, program)

    def run(w, act):
        on = on_of(w, act).reshape(-1, WARP)
        store(w, act, (on & (np.cumsum(on, 1) == 1)).ravel())

    return run


def build_activemask(i, program):
    store = writer(i.args[0], program)
    return lambda w, act: store(w, act, ballot(on_of(w, act)))


def build_warp_barrier(i, program):
    def run(w, act):
        if w.machine.clocks is not None:
            w.machine.clocks.warp_sync(w.gid[on_of(w, act)])

    return run


def build_fence(i, program):
    """fence and membar: .sc and .acq_rel are alike here, see protocols.py for the difference."""
    known = {"sc", "acq_rel", "gpu", "gl", "sys", "cta"}
    if set(i.op[1:]) - known:
        raise Unsupported(i.text)

    def run(w, act):
        if "cta" in i.op:
            w.machine.note("scope", f"a fence only for its own block: {i.text}")
        elif w.machine.clocks is not None:
            w.machine.clocks.fence(w.gid[on_of(w, act)])

    return run
