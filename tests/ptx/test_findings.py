"""Every kind of finding is found where it is, and not where one line prevents it."""

from __future__ import annotations

import numpy as np
import pytest

from .memory import Fault
from .parse import Unsupported
from .tiny import execute, kinds

OUT = "mad.wide.u32 %at, %t, 4, %out; st.global.b32 [%at], %r1;"
SHARED = ".shared .align 16 .b8 buffer[512];"
OWN = "mov.u32 %r5, buffer; mad.lo.s32 %r5, %tx, 4, %r5;"
# the neighbour 32 threads on, of 64
OTHER = "xor.b32 %r6, %tx, 32; mov.u32 %r7, buffer; mad.lo.s32 %r7, %r6, 4, %r7;"
LANE = "xor.b32 %r6, %tx, 1; mov.u32 %r7, buffer; mad.lo.s32 %r7, %r6, 4, %r7;"

FAULTS = {
    "load behind the end": "ld.global.b32 %r1, [%in+256];",
    "load before the start": "ld.global.b32 %r1, [%in-4];",
    "store behind the end": "st.global.b32 [%out+128], 1;",
    "half of a vector behind the end": "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%in+248];",
    "shared memory behind its end": "mov.u32 %r5, buffer; ld.shared.b32 %r1, [%r5+512];",
    "misaligned": "ld.global.v2.b32 {%r1, %r2}, [%in+4];",
    "misaligned in shared memory": "mov.u32 %r5, buffer; st.shared.v4.b32 [%r5+8], {%t,%t,%t,%t};",
    "misaligned copy": "mov.u32 %r5, buffer; cp.async.ca.shared.global [%r5+4], [%in], 8;",
    "write to an input": "st.global.b32 [%in], 1;",
    "atomic on an input": "red.global.add.u32 [%in], 1;",
    "misaligned matrix": "mov.u32 %r5, buffer;"
    "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r5+8];",
    "a matrix for a part of a warp": "mov.u32 %r5, buffer; setp.lt.u32 %p1, %tx, 9;"
    "@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r5];",
    "null": "mov.b64 %d1, 0; ld.global.b32 %r1, [%d1];",
    "a lane that a mask names leaves": "setp.eq.u32 %p1, %tx, 3; @%p1 exit;"
    "shfl.sync.bfly.b32 %r1, %tx, 1, 31, -1;",
    "a lane outside its own mask": "shfl.sync.bfly.b32 %r1, %tx, 1, 31, 1;",
    "lanes at two shuffles": "setp.eq.u32 %p1, %tx, 3; @%p1 bra OTHER;"
    "shfl.sync.bfly.b32 %r1, %tx, 1, 31, -1; bra.uni END;"
    "OTHER: shfl.sync.bfly.b32 %r1, %tx, 2, 31, -1; END: mov.u32 %r1, 0;",
    "a vote that half of a warp misses": "setp.lt.u32 %p1, %tx, 16; @%p1 bra END;"
    "vote.sync.ballot.b32 %r1, %p1, -1; END: mov.u32 %r2, 0; bar.sync 0;",
    "trap": "trap;",
    "no end": "LOOP: bra LOOP;",
}


@pytest.mark.parametrize("body", FAULTS.values(), ids=FAULTS)
def test_fault(body, monkeypatch):
    monkeypatch.setattr("tests.ptx.machine.LIMIT", 10_000)
    with pytest.raises(Fault):
        execute(body + OUT, outside=SHARED)


def test_too_many_threads():
    from .machine import Machine
    from .parse import parse
    from .program import Program

    program = Program(parse(".visible .entry k() .maxntid 64, 1, 1 { ret; }"), "k")
    with pytest.raises(Fault, match="96 threads"):
        Machine(program, grid=1, block=96, params=[], regions=[])


# kind, (found, not found): bodies for two warps
FOUND = {
    "uninitialised shared memory": (
        "uninitialised",
        OWN + "ld.shared.b32 %r1, [%r5];",
        OWN + "st.shared.b32 [%r5], 1; ld.shared.b32 %r1, [%r5];",
    ),
    "uninitialised output": (
        "uninitialised",
        "mad.wide.u32 %at, %t, 4, %out; ld.global.b32 %r1, [%at];",
        "mov.u32 %r1, 0;",
    ),
    "uninitialised register": (
        "register",
        "add.s32 %r1, %r2, 1;",
        "mov.u32 %r2, 0; add.s32 %r1, %r2, 1;",
    ),
    "a register that one path leaves out": (
        "register",
        "setp.lt.u32 %p1, %tx, 7; @%p1 bra SKIP; mov.u32 %r2, 1; SKIP: mov.u32 %r1, %r2;",
        "setp.lt.u32 %p1, %tx, 99; @!%p1 bra SKIP; mov.u32 %r2, 1; SKIP: mov.u32 %r1, %r2;",
    ),
    "a register that a predicate leaves out": (
        "register",
        "setp.lt.u32 %p1, %tx, 7; @%p1 mov.u32 %r2, 1; mov.u32 %r1, %r2;",
        "setp.lt.u32 %p1, %tx, 7; @%p1 mov.u32 %r2, 1; mov.u32 %r1, 0; @%p1 mov.u32 %r1, %r2;",
    ),
    "an undefined lane that a shuffle brings": (
        "register",
        "setp.lt.u32 %p1, %laneid, 16; @%p1 mov.u32 %r2, 1;"
        "shfl.sync.bfly.b32 %r3, %r2, 16, 31, -1; mov.u32 %r1, %r3;",
        "setp.lt.u32 %p1, %laneid, 16; @%p1 mov.u32 %r2, 1;"
        "shfl.sync.bfly.b32 %r3, %r2, 8, 31, -1; selp.b32 %r1, %r3, 0, %p1;",
    ),
    "the undefined word of a pair": (
        "register",
        "setp.lt.u32 %p1, %tx, 7; @%p1 mov.u32 %r2, 1; mov.u32 %r3, 0; mov.b64 %d1, {%r3, %r2};"
        "add.rn.f32x2 %d2, %d1, %d1; mov.b64 {_, %r1}, %d2;",
        "setp.lt.u32 %p1, %tx, 7; @%p1 mov.u32 %r2, 1; mov.u32 %r3, 0; mov.b64 %d1, {%r3, %r2};"
        "add.rn.f32x2 %d2, %d1, %d1; mov.b64 {%r1, _}, %d2;",
    ),
    "a number of which a word is undefined": (
        "register",
        "setp.lt.u32 %p1, %tx, 7; @%p1 mov.u32 %r2, 1; mov.u32 %r3, 0; mov.b64 %d1, {%r3, %r2};"
        "add.s64 %d2, %d1, %d1; mov.b64 {%r1, _}, %d2;",
        "mov.u32 %r2, 1; mov.u32 %r3, 0; mov.b64 %d1, {%r3, %r2};"
        "add.s64 %d2, %d1, %d1; mov.b64 {%r1, _}, %d2;",
    ),
    "an undefined predicate that does not matter": (
        "register",
        "setp.lt.u32 %p1, %laneid, 16; @%p1 mov.u32 %r2, 1; setp.eq.u32 %p2, %r2, 1;"
        "or.pred %p3, %p1, %p2; mov.u32 %r1, 0; @%p3 mov.u32 %r1, 1;",
        "setp.lt.u32 %p1, %laneid, 16; @%p1 mov.u32 %r2, 1; setp.eq.u32 %p2, %r2, 1;"
        "and.pred %p3, %p1, %p2; mov.u32 %r1, 0; @%p3 mov.u32 %r1, 1;",
    ),
    "an undefined address": (
        "register",
        "setp.gt.u32 %p1, %tx, 99; @%p1 mov.b64 %d1, 0; add.s64 %d2, %in, %d1;"
        "ld.global.b32 %r1, [%d2];",
        "setp.lt.u32 %p1, %tx, 99; @%p1 mov.b64 %d1, 0; add.s64 %d2, %in, %d1;"
        "ld.global.b32 %r1, [%d2];",
    ),
    "a predicate that nothing sets": (
        "register",
        "mov.u32 %r1, 0; @%p1 mov.u32 %r1, 1;",
        "mov.u32 %r1, 0; setp.lt.u32 %p1, %tx, 7; @%p1 mov.u32 %r1, 1;",
    ),
    "output nobody writes": (
        "never written",
        "mov.u32 %r1, 0; setp.eq.u32 %p1, %tx, 5; @%p1 exit;",
        "mov.u32 %r1, 0;",
    ),
    "copy before its wait": (
        "uninitialised",
        OWN + "mad.wide.u32 %at, %tx, 4, %in; cp.async.ca.shared.global [%r5], [%at], 4;"
        "cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %r1, [%r5];",
        OWN + "mad.wide.u32 %at, %tx, 4, %in; cp.async.ca.shared.global [%r5], [%at], 4;"
        "cp.async.commit_group; cp.async.wait_group 0; ld.shared.b32 %r1, [%r5];",
    ),
    "shuffle from a lane that takes no part": (
        "shuffle",
        "mov.u32 %r1, 0; setp.lt.u32 %p1, %laneid, 16;"
        "@%p1 shfl.sync.bfly.b32 %r1, %tx, 16, 31, 0xffff;",
        "mov.u32 %r1, 0; setp.lt.u32 %p1, %laneid, 16;"
        "@%p1 shfl.sync.bfly.b32 %r1, %tx, 8, 31, 0xffff;",
    ),
    "two barriers": (
        "barrier",
        "mov.u32 %r1, 0; setp.lt.u32 %p1, %tx, 32; @%p1 bra A; bar.sync 0; bra.uni B; A:"
        " bar.sync 0; B: mov.u32 %r2, 0;",
        "mov.u32 %r1, 0; setp.lt.u32 %p1, %tx, 32; @%p1 bra A; A: bar.sync 0;",
    ),
    "read after write by another warp": (
        "race",
        OWN + OTHER + "st.shared.b32 [%r5], %tx; ld.shared.b32 %r1, [%r7];",
        OWN + OTHER + "st.shared.b32 [%r5], %tx; bar.sync 0; ld.shared.b32 %r1, [%r7];",
    ),
    "write after read by another warp": (
        "race",
        OWN + OTHER + "st.shared.b32 [%r5], %tx; bar.sync 0; ld.shared.b32 %r1, [%r7];"
        "st.shared.b32 [%r5], 1;",
        OWN + OTHER + "st.shared.b32 [%r5], %tx; bar.sync 0; ld.shared.b32 %r1, [%r7];"
        "bar.sync 0; st.shared.b32 [%r5], 1;",
    ),
    "read after write by another lane": (
        "race",
        OWN + LANE + "st.shared.b32 [%r5], %tx; ld.shared.b32 %r1, [%r7];",
        OWN + LANE + "st.shared.b32 [%r5], %tx; bar.warp.sync -1; ld.shared.b32 %r1, [%r7];",
    ),
    "a shuffle orders nothing": (
        "race",
        OWN + LANE + "st.shared.b32 [%r5], %tx; shfl.sync.bfly.b32 %r2, %tx, 1, 31, -1;"
        "ld.shared.b32 %r1, [%r7];",
        OWN + LANE + "st.shared.b32 [%r5], %tx; bar.sync 0; ld.shared.b32 %r1, [%r7];",
    ),
    "every lane reads what one writes": (
        "race",
        "mov.u32 %r5, buffer; setp.eq.u32 %p1, %tx, 31; @%p1 st.shared.b32 [%r5], 1; bar.sync 0;"
        "ld.shared.b32 %r1, [%r5]; @%p1 st.shared.b32 [%r5], 2;",
        "mov.u32 %r5, buffer; setp.eq.u32 %p1, %tx, 31; @%p1 st.shared.b32 [%r5], 1; bar.sync 0;"
        "ld.shared.b32 %r1, [%r5]; bar.sync 0; @%p1 st.shared.b32 [%r5], 2;",
    ),
    "lanes that store to one place": (
        "same store",
        "mov.u32 %r5, buffer; st.shared.b32 [%r5], %tx; mov.u32 %r1, 0;",
        "mov.u32 %r5, buffer; setp.eq.u32 %p1, %tx, 0; @%p1 st.shared.b32 [%r5], %tx;"
        "mov.u32 %r1, 0;",
    ),
}


@pytest.mark.parametrize("kind", FOUND)
def test_finding(kind):
    name, bad, good = FOUND[kind]
    _, machine = execute(bad + OUT, out=64, block=64, outside=SHARED)
    assert kinds(machine) == {name}, machine.findings
    _, machine = execute(good + OUT, out=64, block=64, outside=SHARED)
    assert not machine.findings


# blocks 0 and 1: one stores to the output, counts, and the last to arrive reads all of it
ARRIVE = """setp.eq.u32 %p2, %tx, 0;
mad.wide.u32 %at, %t, 4, %out; st.global.b32 [%at], %t;
{before}
@%p2 atom.global.{sem}.add.u32 %r1, [%in], 1;
{after}
mov.u32 %r5, buffer;
@%p2 st.shared.b32 [%r5], %r1;
bar.sync 0;
ld.shared.b32 %r2, [%r5];
setp.ne.u32 %p3, %r2, 1;
@%p3 exit;
xor.b32 %r3, %t, 64;
mad.wide.u32 %at, %r3, 4, %out;
ld.global.b32 %r4, [%at];
"""
ORDERED = {
    "acq_rel": ("bar.sync 0;", "acq_rel.gpu", ""),
    "fences": ("bar.sync 0; fence.acq_rel.gpu;", "relaxed.gpu", "fence.acq_rel.gpu;"),
    "membar": ("bar.sync 0; membar.gl;", "gpu", "membar.gl;"),
}
UNORDERED = {
    # a pattern releases what precedes its fence in the thread that counts
    "fence before the barrier": ("membar.gl; bar.sync 0;", "gpu", "membar.gl;"),
    "relaxed": ("bar.sync 0;", "relaxed.gpu", ""),
    "release": ("bar.sync 0;", "release.gpu", ""),
    "acquire": ("bar.sync 0;", "acquire.gpu", ""),
    "no barrier before": ("", "acq_rel.gpu", ""),
    "no fence after": ("bar.sync 0; membar.gl;", "gpu", ""),
    "no fence before": ("bar.sync 0;", "gpu", "membar.gl;"),
    "a fence of the block": ("bar.sync 0; membar.cta;", "gpu", "membar.gl;"),
}


def arrive(before, sem, after, seed):
    body = ARRIVE.format(before=before, sem=sem, after=after)
    given = np.zeros(4, np.int32)
    options = {"out": 128, "grid": 2, "block": 64, "outside": SHARED, "writable": True}
    return execute(body, given, seed=seed, **options)[1]


@pytest.mark.parametrize("how", ORDERED)
def test_last_to_arrive_may_read(how):
    for seed in range(4):
        assert not arrive(*ORDERED[how], seed).findings


@pytest.mark.parametrize("how", UNORDERED)
def test_last_to_arrive_may_not_read(how):
    for seed in range(4):
        assert "race" in kinds(arrive(*UNORDERED[how], seed))


def test_an_atomic_of_its_block_only():
    body = "atom.global.relaxed.cta.add.u32 %r1, [%in], 1;" + OUT
    _, machine = execute(body, writable=True)
    assert kinds(machine) == {"scope"}


def test_atomic_beside_a_plain_store():
    body = "st.global.b32 [%in], 5; atom.global.add.u32 %r1, [%in], 1;"
    first = "setp.eq.u32 %p1, %tx, 0; setp.eq.u32 %p2, %tx, 1; mov.u32 %r1, 0; @%p1 "
    _, machine = execute(first + body.replace("atom", "@%p2 atom") + OUT, writable=True)
    assert kinds(machine) == {"race"}


def test_seeds_are_schedules():
    """Which block is last at a counter depends on the seed."""
    body = "setp.eq.u32 %p1, %tx, 0; mov.u32 %r1, 0; @%p1 atom.global.add.u32 %r1, [%in], 1;" + OUT
    last = set()
    for seed in range(16):
        given = np.zeros(4, np.int32)
        got, _ = execute(body, given, out=128, grid=4, seed=seed, writable=True)
        last.add(int(got.reshape(4, 32)[:, 0].argmax()))
    assert last == {0, 1, 2, 3}


def test_a_host_function_in_device_code_shows():
    """nvcc only warns of it; what it leaves is an extern function or an empty kernel."""
    with pytest.raises(Unsupported, match="_Z9host_onlyf"):
        execute("", outside=".extern .func (.param .b32 r) _Z9host_onlyf (.param .b32 x);")
    _, machine = execute("ret;")
    assert kinds(machine) == {"never written"}
