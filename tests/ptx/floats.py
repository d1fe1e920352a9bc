"""Floating-point arithmetic (PTX ISA, 9.7.3 to 9.7.5)."""

from __future__ import annotations

import numpy as np

from .numbers import (
    bf16_to_f32,
    directed,
    dtype_of,
    extremum,
    f32_to_bf16,
    flush,
    fma32,
    fma64,
    narrow,
    pack,
    unpack,
    widen,
)
from .operands import reader, wide, writer
from .parse import Unsupported


def _largest(*x):
    r = x[0]
    for y in x[1:]:
        r = extremum(r, y, True)
    return r


def _smallest(*x):
    r = x[0]
    for y in x[1:]:
        r = extremum(r, y, False)
    return r


def _in_double(function):
    """Approximate instructions are exact here: their hardware error is not modelled."""
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


FUNCTIONS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": _largest,
    "min": _smallest,
    "neg": np.negative,
    "abs": np.abs,
    "ex2": _in_double(np.exp2),
    "lg2": _in_double(np.log2),
    "rcp": _in_double(lambda x: 1 / x),
    "sqrt": np.sqrt,
    "rsqrt": _in_double(lambda x: 1 / np.sqrt(x)),
    "tanh": _in_double(np.tanh),
    "sin": _in_double(np.sin),
    "cos": _in_double(np.cos),
    "copysign": lambda sign, x: np.copysign(x, sign),
}
_KNOWN = {"rn", "rz", "rm", "rp", "ftz", "sat", "approx", "full", "NaN"}
_EXACT = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
}


def build(i, program):
    o, t = i.op[0], i.op[-1]
    if t in ("bf16", "f16") and i.op[-2] == "f32":
        return _mixed(i, program)
    unknown = set(i.op[1:-1]) - _KNOWN
    if unknown:
        raise Unsupported(f"{unknown.pop()} of {i.text}")
    if t in ("bf16x2", "f16x2"):
        return _packed(i, program)
    if t in ("bf16", "f16"):
        return _half(i, program)
    if t == "f32x2":
        return _pair(i, program)
    gets = [reader(a, t, program) for a in i.args[1:]]
    store = writer(i.args[0], program)
    dtype = dtype_of(t)
    ftz, sat, nan = "ftz" in i.op, "sat" in i.op, "NaN" in i.op
    mode = next((r for r in ("rz", "rm", "rp") if r in i.op), None)
    if o in ("fma", "mad"):
        o, function = "fma", fma32 if t == "f32" else fma64
    elif o in FUNCTIONS:
        function = FUNCTIONS[o]
    else:
        raise Unsupported(i.text)
    if mode is not None:
        if t != "f32" or o not in _EXACT:
            raise Unsupported(i.text)
        exact = _EXACT[o]

        def function(*x):
            return directed(exact(*(np.asarray(v, np.float64) for v in x)), mode)

    def run(w, act):
        x = [wide(w, get(w)) for get in gets]
        if ftz:
            x = [flush(v) for v in x]
        r = function(*x)
        if nan:
            r = np.where(np.logical_or.reduce([np.isnan(v) for v in x]), dtype(np.nan), r)
        if ftz:
            r = flush(r)
        if sat:
            r = np.where(np.isnan(r), dtype(0), np.clip(r, 0, 1))
        store(w, act, r.astype(dtype, copy=False))

    return run


def _mixed(i, program):
    """Of float32, but for the first operand, of fma the first two, which are 16-bit floats."""
    o, t = i.op[0], i.op[-1]
    if o not in ("add", "sub", "fma") or i.op[1:-2] != ["rn"]:
        raise Unsupported(i.text)
    *narrow, last = i.args[1:]
    gets, get_last = [reader(a, "b16", program) for a in narrow], reader(last, "f32", program)
    store, function = writer(i.args[0], program), fma32 if o == "fma" else FUNCTIONS[o]

    def run(w, act):
        store(w, act, function(*(widen(wide(w, g(w)), t) for g in gets), wide(w, get_last(w))))

    return run


def _short(o: str, text: str):
    """On float32 values of 16-bit floats; the product and sum are exact enough in float64."""
    if o == "fma":
        return lambda x, y, z: (x.astype(np.float64) * y + z).astype(np.float32)
    if o not in ("add", "sub", "mul", "max", "min", "neg", "abs", "ex2", "tanh"):
        raise Unsupported(text)
    return FUNCTIONS[o]


def _nan_aware(function, op):
    if "NaN" not in op:
        return function

    def run(*x):
        any_nan = np.logical_or.reduce([np.isnan(v) for v in x])
        return np.where(any_nan, np.float32(np.nan), function(*x)).astype(np.float32)

    return run


def reduce(op: list[str], x):
    """min or max of the lanes of a warp."""
    return _nan_aware(FUNCTIONS[op[2]], op)(*x[:, None])[0]


def _packed(i, program):
    t = i.op[-1]
    gets = [reader(a, "b32", program) for a in i.args[1:]]
    store = writer(i.args[0], program)
    function = _nan_aware(_short(i.op[0], i.text), i.op)

    def run(w, act):
        halves = [unpack(wide(w, get(w)), t) for get in gets]
        low, high = (function(*(h[k] for h in halves)) for k in (0, 1))
        store(w, act, pack(low, high, t))

    return run


def _half(i, program):
    t = i.op[-1]
    gets = [reader(a, "b16", program) for a in i.args[1:]]
    store = writer(i.args[0], program)
    function = _nan_aware(_short(i.op[0], i.text), i.op)
    return lambda w, act: store(
        w, act, narrow(function(*(widen(wide(w, get(w)), t) for get in gets)), t)
    )


def _pair(i, program):
    function = {"fma": fma32, "add": np.add, "sub": np.subtract, "mul": np.multiply}.get(i.op[0])
    if function is None:
        raise Unsupported(i.text)
    gets = [reader(a, "b64", program) for a in i.args[1:]]
    store = writer(i.args[0], program)

    def run(w, act):
        x = [wide(w, get(w)).view(np.float32) for get in gets]
        store(w, act, np.ascontiguousarray(function(*x)).view(np.uint64))

    return run


_ROUNDERS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def build_cvt(i, program):
    """cvt (PTX ISA, 9.7.9.21): a narrower result fills its register by its sign or with zeros."""
    to, of = i.op[-2], i.op[-1]
    unknown = set(i.op[1:-2]) - {*_KNOWN, *_ROUNDERS}
    if unknown:
        raise Unsupported(f"{unknown.pop()} of {i.text}")
    store = writer(i.args[0], program)
    ftz, sat = "ftz" in i.op, "sat" in i.op
    if to in ("bf16x2", "f16x2"):
        high, low = reader(i.args[1], of, program), reader(i.args[2], of, program)
        return lambda w, act: store(w, act, pack(wide(w, low(w)), wide(w, high(w)), to))
    get = reader(i.args[1], of, program)
    rounder = next((_ROUNDERS[r] for r in i.op if r in _ROUNDERS), None)
    mode = next((r for r in ("rz", "rm", "rp") if r in i.op), None)
    from_float, dtype = "f" in of, dtype_of(to)

    def run(w, act):
        x = wide(w, get(w))
        x = bf16_to_f32(x) if of == "bf16" else x
        if ftz and of == "f32":
            x = flush(x)
        if to == "bf16":
            r = f32_to_bf16(x.astype(np.float32))
        elif from_float and to[0] in "su":
            r = _to_integer((rounder or np.trunc)(x.astype(np.float64)), dtype)
        elif from_float:
            r = rounder(x) if rounder and to == of else x
            r = directed(r, mode) if mode else r.astype(dtype)
            r = flush(r) if ftz and to == "f32" else r
            if sat:
                r = np.where(np.isnan(r), dtype(0), np.clip(r, 0, 1)).astype(dtype)
        elif sat:
            limits = np.iinfo(dtype)
            r = np.clip(x, max(limits.min, np.iinfo(x.dtype).min), None)
            r = np.clip(r, None, min(limits.max, np.iinfo(x.dtype).max)).astype(dtype)
        else:
            r = x.astype(dtype)
        store(w, act, r)

    if mode and not (to == "f32" and of == "f64"):
        raise Unsupported(i.text)
    return run


def _to_integer(x, dtype):
    """NaN is 0 and what does not fit is the nearest that does."""
    limits = np.iinfo(dtype)
    x = np.where(np.isnan(x), 0.0, x)
    big, small = x >= float(limits.max), x <= float(limits.min)
    r = np.where(big | small, 0.0, x).astype(dtype)
    return np.where(big, dtype(limits.max), np.where(small, dtype(limits.min), r))
