"""One tiny program for every instruction: results worked out by hand from the PTX ISA."""

from __future__ import annotations

import math

import numpy as np
import pytest

from .parse import Unsupported
from .tiny import evaluate, execute

NAN, INF = math.nan, math.inf
BIG = 2**31 - 1
ALL = 0xFFFFFFFF


def f32(*v):
    return ("f32", v)


def u32(*v):
    return ("u32", v)


def s32(*v):
    return ("s32", v)


def b32(*v):
    return ("b32", v)


def bf16(*v):
    """bfloat16 that are exact in their upper half."""
    return ("b16", [int(np.float32(x).view(np.uint32)) >> 16 for x in v])


def f16(*v):
    return ("b16", [int(np.float16(x).view(np.uint16)) for x in v])


TABLE = [
    # instruction, type of the result, operands, expected
    ("add.s32", "s32", [s32(1, BIG), s32(-3, 1)], [-2, -(2**31)]),
    ("add.s64", "s64", [("s64", [2**40]), ("s64", [-1])], [2**40 - 1]),
    ("add.u16", "u16", [("u16", [65535]), ("u16", [2])], [1]),
    ("sub.u32", "u32", [u32(1), u32(3)], [2**32 - 2]),
    ("mul.lo.s32", "s32", [s32(2**20, -7), s32(2**20, 3)], [0, -21]),
    ("mul.hi.u32", "u32", [u32(2**31), u32(6)], [3]),
    ("mul.hi.s32", "s32", [s32(-(2**31)), s32(2)], [-1]),
    ("mul.hi.u64", "u64", [("u64", [2**63]), ("u64", [6])], [3]),
    ("mul.wide.s32", "s64", [s32(-3), s32(BIG)], [-3 * BIG]),
    ("mul.wide.u16", "u32", [("u16", [65535]), ("u16", [65535])], [65535**2]),
    ("mad.lo.s32", "s32", [s32(3), s32(-4), s32(5)], [-7]),
    ("mad.wide.u32", "u64", [u32(ALL), u32(8), ("u64", [5])], [8 * ALL + 5]),
    ("div.s32", "s32", [s32(-7, 7), s32(2, -2)], [-3, -3]),
    ("rem.s32", "s32", [s32(-7, 7), s32(2, -2)], [-1, 1]),
    ("div.u64", "u64", [("u64", [2**63]), ("u64", [3])], [2**63 // 3]),
    ("rem.u32", "u32", [u32(ALL), u32(10)], [ALL % 10]),
    ("min.s32", "s32", [s32(-1, 5), s32(1, 2)], [-1, 2]),
    ("max.u32", "u32", [u32(ALL, 5), u32(1, 7)], [ALL, 7]),
    ("neg.s32", "s32", [s32(5, -(2**31))], [-5, -(2**31)]),
    ("abs.s32", "s32", [s32(-5, 6)], [5, 6]),
    ("and.b32", "b32", [b32(0xF0F0), b32(0xFF00)], [0xF000]),
    ("or.b64", "b64", [("b64", [1]), ("b64", [2**63])], [2**63 + 1]),
    ("xor.b32", "b32", [b32(0xF0F0), b32(0xFF00)], [0x0FF0]),
    ("not.b32", "b32", [b32(0)], [ALL]),
    ("shl.b32", "b32", [b32(1, 1, 1), u32(4, 32, 99)], [16, 0, 0]),
    ("shr.u32", "u32", [u32(2**31, 2**31), u32(31, 32)], [1, 0]),
    ("shr.s32", "s32", [s32(-8, -8), u32(1, 40)], [-4, -1]),
    ("shf.l.wrap.b32", "b32", [b32(0x80000001), b32(0x2), u32(33)], [5]),
    ("shf.r.clamp.b32", "b32", [b32(1), b32(0xABCD), u32(40)], [0xABCD]),
    ("prmt.b32", "b32", [b32(0x33221180), b32(0x77665544), b32(0x7180)], [0x7711FF80]),
    ("lop3.b32 {}, {}, {}, {}, 0xCA", "b32", [b32(0xF0), b32(0xCC), b32(0xAA)], [0xCA]),
    ("bfe.u32", "u32", [u32(0xABCD), u32(4), u32(8)], [0xBC]),
    ("bfe.s32", "s32", [s32(0xABCD), u32(4), u32(8)], [0xBC - 256]),
    ("popc.b32", "u32", [b32(0xF0F1)], [9]),
    ("clz.b32", "u32", [b32(1, 0)], [31, 32]),
    ("brev.b32", "b32", [b32(1)], [2**31]),
    ("bfind.u32", "u32", [u32(40, 0)], [5, ALL]),
    ("bfind.shiftamt.u32", "u32", [u32(40)], [26]),
    ("setp.lt.s32", "pred", [s32(-1, 1), s32(0, 0)], [True, False]),
    ("setp.lt.u32", "pred", [u32(ALL, 1), u32(2, 2)], [False, True]),
    ("setp.ne.f32", "pred", [f32(1, NAN), f32(2, 1)], [True, False]),
    ("setp.neu.f32", "pred", [f32(1, NAN), f32(1, 1)], [False, True]),
    ("setp.gtu.f32", "pred", [f32(1, NAN), f32(2, 1)], [False, True]),
    ("setp.nan.f32", "pred", [f32(1, NAN), f32(1, 1)], [False, True]),
    ("setp.num.f32", "pred", [f32(1, NAN), f32(1, 1)], [True, False]),
    ("selp.b32 {}, {}, {}, %p0", "b32", [b32(1), b32(2)], [2]),
    ("mov.b32", "b32", [b32(7)], [7]),
    ("mov.b32 {}, 0fBF800000; // {}", "f32", [f32(0)], [-1.0]),
    ("mov.b64 {}, {{{}, {}}}", "b64", [b32(1), b32(2)], [1 + 2 * 2**32]),
    ("cvta.to.global.u64", "u64", [("u64", [123])], [123]),
    # floating point; 1 + 2^-12 squared has one bit more than float32
    ("add.f32", "f32", [f32(1, INF), f32(2.0**-24, -INF)], [1, NAN]),
    ("add.rz.f32", "f32", [f32(1), f32(-(2.0**-30))], [1 - 2.0**-24]),
    ("add.rp.f32", "f32", [f32(1), f32(2.0**-30)], [1 + 2.0**-23]),
    ("sub.rm.f32", "f32", [f32(1), f32(2.0**-30)], [1 - 2.0**-24]),
    ("mul.f32", "f32", [f32(3), f32(-0.0)], [-0.0]),
    ("mul.ftz.f32", "f32", [f32(2.0**-100), f32(2.0**-40)], [0.0]),
    ("mul.f64", "f64", [("f64", [3]), ("f64", [0.1])], [3 * 0.1]),
    ("add.sat.f32", "f32", [f32(1, -1, NAN), f32(1, -1, 0)], [1, 0, 0]),
    (
        "fma.rn.f32",
        "f32",
        [f32(1 + 2.0**-12), f32(1 + 2.0**-12), f32(-1 - 2.0**-11)],
        [2.0**-24],
    ),
    # the double rounding that a product and sum in float64 would make
    (
        "fma.rn.f32",
        "f32",
        [f32(1 + 2.0**-23), f32(2.0**-24), f32(1)],
        [1 + 2.0**-23],
    ),
    ("fma.rn.f64", "f64", [("f64", [2.0**600]), ("f64", [2.0**500]), ("f64", [-INF])], [-INF]),
    ("div.rn.f32", "f32", [f32(1, 1), f32(3, 0)], [np.float32(1) / np.float32(3), INF]),
    ("div.full.f32", "f32", [f32(6), f32(3)], [2]),
    ("max.f32", "f32", [f32(NAN, -0.0), f32(1, 0.0)], [1, 0.0]),
    ("max.NaN.f32", "f32", [f32(NAN), f32(1)], [NAN]),
    ("min.f32", "f32", [f32(NAN, 0.0), f32(1, -0.0)], [1, -0.0]),
    ("neg.f32", "f32", [f32(0)], [-0.0]),
    ("abs.f32", "f32", [f32(-INF)], [INF]),
    ("ex2.approx.ftz.f32", "f32", [f32(3, -INF, -140)], [8, 0, 0]),
    ("lg2.approx.f32", "f32", [f32(8, 0, -1)], [3, -INF, NAN]),
    ("rcp.approx.f32", "f32", [f32(4, 0)], [0.25, INF]),
    ("rcp.rn.f64", "f64", [("f64", [4])], [0.25]),
    ("sqrt.rn.f32", "f32", [f32(9, -1)], [3, NAN]),
    ("rsqrt.approx.f32", "f32", [f32(16)], [0.25]),
    ("tanh.approx.f32", "f32", [f32(0, 90)], [0, 1]),
    ("sin.approx.f32", "f32", [f32(0)], [0]),
    ("cos.approx.f32", "f32", [f32(0)], [1]),
    ("copysign.f32", "f32", [f32(-0.0), f32(3)], [-3]),
    ("max.bf16", "b16", [bf16(2), bf16(-3)], bf16(2)[1]),
    ("fma.rn.bf16", "b16", [bf16(2), bf16(3), bf16(1)], bf16(7)[1]),
    # the last operand and the result are wider than the rest
    ("add.rn.f32.bf16", "f32", [bf16(2), f32(2.0**-20)], [2 + 2.0**-20]),
    ("sub.rn.f32.f16", "f32", [f16(2), f32(-(2.0**-20))], [2 + 2.0**-20]),
    ("fma.rn.f32.bf16", "f32", [bf16(3), bf16(-2), f32(2.0**-18)], [2.0**-18 - 6]),
    ("add.f16", "b16", [f16(2), f16(3)], f16(5)[1]),
    ("max.NaN.bf16x2", "b32", [b32(0x40003F80), b32(0x3F807FC0)], [0x40007FFF]),
    ("mul.f16x2", "b32", [b32(0x40003C00), b32(0x40004000)], [0x44004000]),
    (
        "add.rn.f32x2",
        "b64",
        [("b64", [0x3F80000040000000]), ("b64", [0x3F8000003F800000])],
        [0x4000000040400000],
    ),
    ("cvt.rn.f32.s32", "f32", [s32(-3, 2**24 + 1)], [-3, 2**24]),
    ("cvt.rzi.s32.f32", "s32", [f32(-1.9, NAN, 1e20)], [-1, 0, BIG]),
    ("cvt.rni.s32.f32", "s32", [f32(2.5, 3.5)], [2, 4]),
    ("cvt.rpi.s64.f32", "s64", [f32(2.1)], [3]),
    ("cvt.rmi.f32.f32", "f32", [f32(-2.1)], [-3]),
    ("cvt.rn.f32.f64", "f32", [("f64", [1 + 2.0**-30])], [1]),
    ("cvt.rp.f32.f64", "f32", [("f64", [1 + 2.0**-30])], [1 + 2.0**-23]),
    ("cvt.f64.f32", "f64", [f32(0.1)], [float(np.float32(0.1))]),
    ("cvt.s64.s32", "s64", [s32(-5)], [-5]),
    ("cvt.u64.u32", "u64", [u32(ALL)], [ALL]),
    ("cvt.u16.u32", "u16", [u32(70000)], [70000 - 65536]),
    ("cvt.sat.u32.s32", "u32", [s32(-5, 5)], [0, 5]),
    ("cvt.sat.f32.f32", "f32", [f32(-5, 0.5, NAN)], [0, 0.5, 0]),
    ("cvt.f32.bf16", "f32", [bf16(1.5)], [1.5]),
    ("cvt.f32.f16", "f32", [("f16", [1.5])], [1.5]),
    ("cvt.rn.bf16.f32", "b16", [f32(1 + 2.0**-8, 1 + 3 * 2.0**-8, NAN)], [0x3F80, 0x3F82, 0x7FFF]),
    ("cvt.rn.f16.f32", "b16", [f32(1e6)], f16(INF)[1]),
    ("cvt.rn.bf16x2.f32", "b32", [f32(1), f32(2)], [0x3F804000]),
    ("cvt.rn.f16x2.f32", "b32", [f32(1), f32(2)], [0x3C004000]),
]


@pytest.mark.parametrize(("text", "type_", "operands", "want"), TABLE, ids=lambda x: str(x)[:30])
def test_value(text, type_, operands, want):
    if "%p0" in text:
        text = "setp.ne.u32 %p0, 0, 0; " + text
    got = evaluate(text, type_, *operands)
    np.testing.assert_array_equal(got, np.array(want).astype(got.dtype))
    if got.dtype.kind == "f":
        zero = got == 0
        assert (np.signbit(got) == np.signbit(np.array(want, got.dtype)))[zero].all()


OUT = "mad.wide.u32 %at, %t, 4, %out; st.global.b32 [%at], %r1;"
SHUFFLES = {
    "shfl.sync.up.b32 %r1, %tx, 1, 0, -1;": [0, *range(31)],
    "shfl.sync.down.b32 %r1, %tx, 2, 31, -1;": [*range(2, 32), 30, 31],
    "shfl.sync.bfly.b32 %r1|%p1, %tx, 16, 31, 0xffffffff;": [k ^ 16 for k in range(32)],
    "shfl.sync.idx.b32 %r1, %tx, 3, 31, -1;": [3] * 32,
    # segments of 8 lanes
    "shfl.sync.idx.b32 %r1, %tx, 3, 6175, -1;": [k // 8 * 8 + 3 for k in range(32)],
    "setp.lt.u32 %p1, %tx, 5; vote.sync.ballot.b32 %r1, %p1, -1;": [31] * 32,
    "setp.lt.u32 %p1, %tx, 5; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;": [1] * 32,
    "setp.lt.u32 %p1, %tx, 5; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;": [0] * 32,
    "redux.sync.add.s32 %r1, %tx, -1;": [496] * 32,
    "redux.sync.max.u32 %r1, %tx, -1;": [31] * 32,
    "setp.eq.u32 %p1, %tx, 7; mov.b32 %r1, 5; selp.b32 %r1, 0f3F800000, %r1, %p1;"
    "redux.sync.max.u32 %r1, %r1, -1;": [0x3F800000] * 32,
    # -0 is less than 0; a NaN is no number, unless the instruction asks for it
    "mov.b32 %r2, 0f80000000; setp.eq.u32 %p1, %tx, 7; selp.b32 %r2, 0f00000000, %r2, %p1;"
    "setp.eq.u32 %p2, %tx, 9; selp.b32 %r2, 0f7FC00000, %r2, %p2;"
    "redux.sync.max.f32 %r1, %r2, -1;": [0] * 32,
    "mov.b32 %r2, 0f80000000; setp.eq.u32 %p1, %tx, 7; selp.b32 %r2, 0f00000000, %r2, %p1;"
    "redux.sync.min.f32 %r1, %r2, -1;": [-(2**31)] * 32,
    "mov.b32 %r2, 0f80000000; setp.eq.u32 %p1, %tx, 7; selp.b32 %r2, 0f7FC00000, %r2, %p1;"
    "redux.sync.min.NaN.f32 %r1, %r2, -1;": [0x7FC00000] * 32,
    "elect.sync _|%p1, -1; selp.b32 %r1, 1, 0, %p1;": [1] + [0] * 31,
    "activemask.b32 %r1;": [-1] * 32,
    "mov.u32 %r1, %laneid;": list(range(32)),
    "mov.u32 %r1, %lanemask_lt;": [2**k - 1 for k in range(32)],
    "mov.u32 %r1, %nctaid.x;": [1] * 32,
    "mov.u32 %r1, %ntid.y;": [1] * 32,
    "mov.u32 %r1, %tid.z;": [0] * 32,
    # a loop of as many turns as the thread's number
    "mov.u32 %r1, 0; LOOP: setp.ge.u32 %p1, %r1, %tx; @%p1 bra DONE; add.s32 %r1, %r1, 1;"
    " bra.uni LOOP; DONE: mul.lo.s32 %r1, %r1, 2;": [2 * k for k in range(32)],
    # half of the lanes take another way and are back for the vote
    "setp.lt.u32 %p1, %tx, 16; mov.u32 %r1, 1; @%p1 bra SKIP; mov.u32 %r1, 2; SKIP:"
    " redux.sync.add.s32 %r1, %r1, -1;": [48] * 32,
    # a name declared again inside braces is another register
    "mov.u32 %r1, 5; { .reg .b32 %r1; mov.u32 %r1, 6; }": [5] * 32,
    "setp.eq.u32 %p1, %tx, 0; mov.u32 %r1, 1; @%p1 exit; mov.u32 %r1, 2;": [-1] + [2] * 31,
}


@pytest.mark.parametrize("body", SHUFFLES)
def test_warp(body):
    got, machine = execute(body + OUT)
    assert got.tolist() == SHUFFLES[body]
    assert {kind for kind, _ in machine.findings} <= {"never written"}


ATOMICS = {
    "add.u32": (5, 5 + 496),
    "min.s32": (7, 0),
    "max.s32": (7, 31),
    "or.b32": (32, 63),
    "and.b32": (ALL, 0),
    "xor.b32": (64, 64),
}


@pytest.mark.parametrize("name", ATOMICS)
def test_atomic(name):
    before, after = ATOMICS[name]
    given = np.full(4, np.uint32(before)).view(np.int32)
    body = f"atom.global.relaxed.gpu.{name} %r1, [%in], %tx; red.global.gpu.{name} [%in+4], %tx;"
    _, _ = execute(body + OUT, given, writable=True)
    assert given.view(np.uint32).tolist() == [after, after, before, before]


def test_atomic_exchange_and_compare():
    given = np.array([9, 9, 0, 0], np.int32)
    body = "atom.global.exch.b32 %r1, [%in], 3; atom.global.cas.b32 %r2, [%in+4], 9, %tx;"
    got, _ = execute(body + OUT, given, writable=True)
    assert given[0] == 3 and sorted(got.tolist()) == [3] * 31 + [9]
    assert 0 <= given[1] < 32


MEMORY = {
    "vector": "mad.wide.u32 %at, %tx, 16, %in; ld.global.cs.v4.b32 {%r1, %r2, %r3, %r4}, [%at];"
    "add.s32 %r1, %r1, %r4;",
    "shared": "mov.u32 %r5, buffer; mad.lo.s32 %r5, %tx, 4, %r5; st.shared.b32 [%r5], %tx;"
    "bar.sync 0; ld.shared.b32 %r1, [%r5]; mul.lo.s32 %r1, %r1, 8; add.s32 %r1, %r1, 3;",
    "generic": "mov.u64 %d1, buffer; cvta.shared.u64 %d1, %d1; mad.wide.u32 %d1, %tx, 4, %d1;"
    "st.b32 [%d1], %tx; ld.b32 %r1, [%d1]; mad.lo.s32 %r1, %r1, 8, 3;",
    "local": ".local .align 4 .b8 own[8]; mov.u64 %d1, own; cvta.local.u64 %d1, %d1;"
    "st.b32 [%d1+4], %tx; ld.local.b32 %r1, [own+4]; mad.lo.s32 %r1, %r1, 8, 3;",
    "copy": "mov.u32 %r5, buffer; mad.lo.s32 %r5, %tx, 16, %r5; mad.wide.u32 %at, %tx, 16, %in;"
    "cp.async.cg.shared.global [%r5], [%at], 16; cp.async.commit_group; cp.async.wait_group 0;"
    "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5]; add.s32 %r1, %r1, %r4;",
    "ignored copy": "mov.u32 %r5, buffer; mad.lo.s32 %r5, %tx, 16, %r5; mov.u32 %r6, 0;"
    "cp.async.cg.shared.global [%r5], [%in], 16, %r6; cp.async.wait_all;"
    "ld.shared.b32 %r1, [%r5]; mad.lo.s32 %r1, %tx, 8, 3; createpolicy.fractional.L2::evict_last"
    ".b64 %d2, 1.0; prefetch.global.L2 [%in];",
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory(name):
    given = np.arange(128, dtype=np.int32)
    outside = ".shared .align 16 .b8 buffer[512];"
    got, machine = execute(MEMORY[name] + OUT, given, outside=outside)
    assert got.tolist() == [8 * k + 3 for k in range(32)]
    assert not machine.findings


# rows of 8 numbers of 16 bits, of which lane t has two: number 64 k + 2 t of matrix k and the next;
# transposed, those at rows 2 (t mod 4) and the next, of column t / 4
MATRICES = {
    "x1": [(2 * t, 2 * t + 1) for t in range(32)],
    "x4": [(192 + 2 * t, 192 + 2 * t + 1) for t in range(32)],
    "x4.trans": [(192 + 16 * (t % 4) + t // 4, 200 + 16 * (t % 4) + t // 4) for t in range(32)],
}


@pytest.mark.parametrize("kind", MATRICES)
def test_matrices(kind):
    """The last register of ldmatrix, which takes the rows at the addresses of the last 8 lanes."""
    given = np.arange(256, dtype=np.uint16).view(np.int32)
    registers = "{%r1}" if kind == "x1" else "{%r2, %r3, %r4, %r1}"
    body = (
        "mov.u32 %r5, buffer; mad.lo.s32 %r5, %tx, 16, %r5; mad.wide.u32 %at, %tx, 16, %in;"
        "ld.global.v4.b32 {%r6, %r7, %r8, %r9}, [%at];"
        "st.shared.v4.b32 [%r5], {%r6, %r7, %r8, %r9};"
        f"bar.warp.sync -1; ldmatrix.sync.aligned.m8n8.{kind}.shared.b16 {registers}, [%r5];"
    )
    got, machine = execute(body + OUT, given, outside=".shared .align 16 .b8 buffer[512];")
    assert got.view(np.uint16).reshape(32, 2).tolist() == [list(pair) for pair in MATRICES[kind]]
    assert not machine.findings


def test_constants_and_globals():
    outside = ".global .align 4 .b32 table[2] = {5, -6};\n.const .align 4 .f32 one = 0f3F800000;"
    body = "ld.global.b32 %r1, [table+4]; ld.const.f32 %r2, [one]; sub.s32 %r1, %r2, %r1;"
    got, _ = execute(body + OUT, outside=outside)
    assert got.tolist() == [0x3F800000 + 6] * 32


UNKNOWN = [
    "mma.sync.aligned.m16n8k8.row.col.f32 %r1, %r1, %r1, %r1;",
    "add.cc.u32 %r1, %r1, %r1;",
    "add.bogus.f32 %r1, %r1, %r1;",
    "ld.acquire.gpu.global.b32 %r1, [%in];",
    "st.volatile.global.b32 [%out], 1;",
    "atom.global.inc.u32 %r1, [%in], 3;",
    "bar.sync 1, 64;",
    "bar.red.popc.u32 %r1, 0, %p1;",
    "fence.proxy.async;",
    "mbarrier.init.shared.b64 [%r1], 1;",
    "cp.async.bulk.wait_group 0;",
    "vote.sync.uni.pred %p1, %p2, -1;",
    "mov.u32 %r1, %clusterid.x;",
    "call.uni (%r1), helper, (%r2);",
    "bra NOWHERE;",
    "cvt.rs.f32.f64 %r1, %d1;",
]


@pytest.mark.parametrize("body", UNKNOWN)
def test_unknown_is_an_error(body):
    with pytest.raises(Unsupported):
        execute(body)


def test_a_function_that_is_not_inlined_is_an_error():
    with pytest.raises(Unsupported, match="helper"):
        execute("", outside=".extern .func (.param .b32 r) helper (.param .b32 x);")
