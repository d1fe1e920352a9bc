"""Integers, bits, comparisons, selections and moves (PTX ISA, 9.7.1, 9.7.6 to 9.7.9)."""

from __future__ import annotations

import numpy as np

from .memory import LOCAL_WINDOW, SHARED_WINDOW
from .numbers import SIZE, UNSIGNED, bf16_to_f32, dtype_of
from .operands import reader, vector, wide, writer
from .parse import Unsupported

_SIMPLE = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}
ARITHMETIC = {*_SIMPLE, "mul", "mad", "div", "rem", "shl", "shr"}
_COMPARE = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal},
    **{"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
}
_UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}
_LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def build(i, program):
    o, t = i.op[0], i.op[-1]
    if t == "pred":
        gets = [reader(a, "pred", program) for a in i.args[1:]]
        store, function = writer(i.args[0], program), {**_LOGIC, "not": np.logical_not}[o]
        return lambda w, act: store(w, act, function(*(get(w) for get in gets)))
    unknown = set(i.op[1:-1]) - {"lo", "hi", "wide"}
    if unknown:
        raise Unsupported(f"{unknown.pop()} of {i.text}")
    if o in ("shl", "shr"):
        return _shift(i, program)
    if o in ("mul", "mad"):
        return _multiply(i, program)
    gets = [reader(a, t, program) for a in i.args[1:]]
    store = writer(i.args[0], program)
    if o in ("div", "rem"):
        return lambda w, act: store(w, act, _divide(o, *(wide(w, get(w)) for get in gets)))
    function = _SIMPLE[o]
    return lambda w, act: store(w, act, function(*(get(w) for get in gets)))


def _shift(i, program):
    o, t = i.op[0], i.op[-1]
    a, s, store = reader(i.args[1], t, program), reader(i.args[2], "u32", program), None
    store, dtype, bits = writer(i.args[0], program), dtype_of(t), 8 * SIZE[t]

    def run(w, act):
        x, count = wide(w, a(w)), np.asarray(s(w))
        safe = np.minimum(count, bits - 1).astype(dtype)
        r = x << safe if o == "shl" else x >> safe
        # amounts beyond the width are clamped to it
        if (o == "shl" or t[0] != "s") and (count >= bits).any():
            r = np.where(count >= bits, dtype(0), r)
        store(w, act, r)

    return run


def _multiply(i, program):
    o, t = i.op[0], i.op[-1]
    size, dtype = SIZE[t], dtype_of(t)
    double = t[0] + str(16 * size)
    is_wide, high = "wide" in i.op, "hi" in i.op
    a, b = reader(i.args[1], t, program), reader(i.args[2], t, program)
    c = reader(i.args[3], double if is_wide else t, program) if o == "mad" else None
    store = writer(i.args[0], program)
    big = dtype_of(double) if size < 8 else None

    def run(w, act):
        x, y = wide(w, a(w)), wide(w, b(w))
        if is_wide:
            r = x.astype(big) * y.astype(big)
        elif high and big is not None:
            r = ((x.astype(big) * y.astype(big)) >> big(8 * size)).astype(dtype)
        elif high:
            products = (int(p) * int(q) >> 64 for p, q in zip(x, y, strict=True))
            r = np.array([v & (2**64 - 1) for v in products], np.uint64).view(dtype)
        else:
            r = x * y
        store(w, act, r if c is None else r + c(w))

    return run


def _divide(o: str, x, y):
    """Towards zero; a quotient by 0 is all ones, as hardware has it (unspecified in PTX)."""
    dtype = x.dtype.type
    safe = np.where(y == 0, dtype(1), y)
    q = x // safe
    if x.dtype.kind == "i":
        q = q + (((x - q * safe) != 0) & ((x < 0) != (safe < 0))).astype(dtype)
    q = np.where(y == 0, dtype(-1) if x.dtype.kind == "i" else np.iinfo(dtype).max, q)
    return q if o == "div" else x - q * y


def compare(name: str, a, b):
    if name in _UNORDERED:
        return _COMPARE[_UNORDERED[name]](a, b) | np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        either = np.isnan(a) | np.isnan(b)
        return either if name == "nan" else ~either
    r = _COMPARE[name](a, b)
    if name == "ne" and np.asarray(a).dtype.kind == "f":
        r = r & ~(np.isnan(a) | np.isnan(b))
    return r


def build_setp(i, program):
    t = i.op[-1]
    middle = [x for x in i.op[1:-1] if x != "ftz"]
    name, logic = middle[0], _LOGIC[middle[1]] if len(middle) > 1 else None
    if name not in _COMPARE and name not in _UNORDERED and name not in ("num", "nan"):
        raise Unsupported(i.text)
    a, b = reader(i.args[1], t, program), reader(i.args[2], t, program)
    other = reader(i.args[3], "pred", program) if logic else None
    stores = [writer(x, program) for x in i.args[0].split("|")]

    def run(w, act):
        x, y = a(w), b(w)
        if t == "bf16":
            x, y = bf16_to_f32(x), bf16_to_f32(y)
        r = compare(name, x, y)
        last = other(w) if logic else None
        for k, store in enumerate(stores):
            v = ~r if k else r
            store(w, act, logic(v, last) if logic else v)

    return run


def build_selp(i, program):
    t = i.op[-1]
    a, b = reader(i.args[1], t, program), reader(i.args[2], t, program)
    p, store = reader(i.args[3], "pred", program), writer(i.args[0], program)
    return lambda w, act: store(w, act, np.where(p(w), a(w), b(w)))


def build_mov(i, program):
    t, (to, of) = i.op[-1], i.args
    if t == "b128" or len(i.op) != 2:
        raise Unsupported(i.text)
    if to.startswith("{"):
        parts = [writer(p, program) for p in vector(to)]
        size = SIZE[t] // len(parts)
        get = reader(of, f"b{8 * SIZE[t]}", program)

        def run(w, act):
            x = np.array(get(w))
            for k, store in enumerate(parts):
                store(w, act, (x >> x.dtype.type(8 * size * k)).astype(UNSIGNED[size]))

        return run
    store = writer(to, program)
    if of.startswith("{"):
        names = vector(of)
        size, dtype = SIZE[t] // len(names), UNSIGNED[SIZE[t]]
        gets = [reader(n, f"b{8 * size}", program) for n in names]

        def run(w, act):
            r = dtype(0)
            for k, get in enumerate(gets):
                r = r | (np.asarray(get(w)).astype(dtype) << dtype(8 * size * k))
            store(w, act, r)

        return run
    get = reader(of, t, program)
    return lambda w, act: store(w, act, get(w))


def build_cvta(i, program):
    get, store = reader(i.args[1], "u64", program), writer(i.args[0], program)
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}
    bit = np.uint64(next((b for s, b in window.items() if s in i.op), 0))
    if "to" in i.op:
        return lambda w, act: store(w, act, get(w) & ~bit)
    return lambda w, act: store(w, act, get(w) | bit)


def build_shf(i, program):
    low, high, n = (reader(x, "b32", program) for x in i.args[1:4])
    store = writer(i.args[0], program)
    left, wrap = i.op[1] == "l", "wrap" in i.op

    def run(w, act):
        x = np.asarray(low(w)).astype(np.uint64)
        x = x | (np.asarray(high(w)).astype(np.uint64) << np.uint64(32))
        s = np.asarray(n(w)).astype(np.uint64)
        s = s & np.uint64(31) if wrap else np.minimum(s, np.uint64(32))
        store(w, act, ((x << s) >> np.uint64(32) if left else x >> s).astype(np.uint32))

    return run


def build_prmt(i, program):
    if len(i.op) != 2:
        raise Unsupported(i.text)
    a, b, selector = (reader(x, "b32", program) for x in i.args[1:4])
    store = writer(i.args[0], program)

    def run(w, act):
        x = wide(w, a(w)).astype(np.uint64) | (wide(w, b(w)).astype(np.uint64) << np.uint64(32))
        s, r = wide(w, selector(w)).astype(np.uint64), np.zeros(w.n, np.uint64)
        for k in range(4):
            nibble = (s >> np.uint64(4 * k)) & np.uint64(15)
            byte = (x >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            r |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * k)
        store(w, act, r.astype(np.uint32))

    return run


def build_lop3(i, program):
    gets = [reader(x, "b32", program) for x in i.args[1:4]]
    table, store = int(i.args[4], 0), writer(i.args[0], program)

    def run(w, act):
        x, y, z = (wide(w, get(w)) for get in gets)
        r = np.zeros(w.n, np.uint32)
        for k in range(8):
            if table >> k & 1:
                r |= (x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z)
        store(w, act, r)

    return run


def build_bfe(i, program):
    t, store = i.op[-1], writer(i.args[0], program)
    a = reader(i.args[1], t, program)
    p, n = (reader(x, "u32", program) for x in i.args[2:4])
    bits = 8 * SIZE[t]
    if bits != 32:
        raise Unsupported(i.text)

    def run(w, act):
        x = wide(w, a(w)).astype(np.int64)
        at, length = (wide(w, v(w)).astype(np.int64) & 255 for v in (p, n))
        length = np.minimum(length, bits)
        r = (x >> np.minimum(at, 63 if t[0] == "s" else 33)) & ((np.int64(1) << length) - 1)
        if t[0] == "s":
            sign = np.where(length > 0, (r >> np.maximum(length - 1, 0)) & 1, 0)
            r = np.where(sign != 0, r | ~((np.int64(1) << length) - 1), r)
        store(w, act, r.astype(dtype_of(t)))

    return run


def build_bits(i, program):
    """popc, clz, brev, bfind."""
    o, t = i.op[0], i.op[-1]
    bits = 8 * SIZE[t]
    if o == "bfind" and t[0] == "s":
        raise Unsupported(i.text)
    a, store = reader(i.args[1], f"b{bits}", program), writer(i.args[0], program)

    def run(w, act):
        x = wide(w, a(w))
        if o == "popc":
            r = np.bitwise_count(x).astype(np.uint32)
        elif o == "brev":
            r = np.array([int(f"{int(v):0{bits}b}"[::-1], 2) for v in x], UNSIGNED[bits // 8])
        else:
            length = np.array([int(v).bit_length() for v in x])
            from_top = o == "clz" or "shiftamt" in i.op
            r = bits - length if from_top else length - 1
            if o == "bfind":
                r = np.where(length == 0, 0xFFFFFFFF, r)
            r = r.astype(np.uint32)
        store(w, act, r)

    return run
