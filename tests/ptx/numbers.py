"""PTX's types as numpy's, and float arithmetic with PTX's rounding (PTX ISA, sections 5.2 and 9.7).

bfloat16 values are uint16 arrays of their bits; packed pairs are uint32.
"""

from __future__ import annotations

import ctypes

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOAT = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
SIZE = {
    **{f"{kind}{bits}": bits // 8 for kind in "bsu" for bits in (8, 16, 32, 64)},
    **{"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "f32x2": 8},
}


def dtype_of(type_: str):
    """numpy's type of a PTX type; the unsigned integer of its size for what numpy lacks."""
    if type_ == "pred":
        return np.bool_
    if type_ in FLOAT:
        return FLOAT[type_]
    return (SIGNED if type_[0] == "s" else UNSIGNED)[SIZE[type_]]


def bf16_to_f32(bits):
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x):
    """Round to nearest even; every NaN is PTX's canonical 0x7fff."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def widen(x, type_: str):
    """A 16-bit float as float32."""
    return bf16_to_f32(x) if type_ == "bf16" else x.view(np.float16).astype(np.float32)


def narrow(x, type_: str):
    """float32 rounded to the bits of a 16-bit float."""
    if type_ == "bf16":
        return f32_to_bf16(x)
    return x.astype(np.float16).view(np.uint16)


def unpack(x, type_: str):
    """(low, high) of a packed pair, as float32."""
    low, high = x.astype(np.uint16), (x >> np.uint32(16)).astype(np.uint16)
    return widen(low, type_[:-2]), widen(high, type_[:-2])


def pack(low, high, type_: str):
    low, high = narrow(low, type_[:-2]), narrow(high, type_[:-2])
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def flush(x):
    """Subnormal float32 to a zero of their sign (.ftz)."""
    tiny = np.abs(x) < np.float32(2.0**-126)
    return np.where(tiny, np.copysign(np.float32(0), x), x) if tiny.any() else x


def fma32(a, b, c):
    """a * b + c in float32 with one rounding.

    The product is exact in float64. The sum's second rounding, to float32, is wrong only where the
    first one made a tie (or the result is subnormal): there the float64 sum is rounded to odd
    first (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    product = np.multiply(a, b, dtype=np.float64)
    c = np.asarray(c, np.float64)
    total = np.atleast_1d(product + c)
    bits = total.view(np.int64)
    risky = ((bits & 0x1FFFFFFF) == 0x10000000) | (np.abs(total) < 2.0**-125)
    if risky.any():
        t = total - product
        error = (product - (total - t)) + (c - t)
        fix = risky & np.isfinite(total) & (error != 0) & ((bits & 1) == 0)
        away = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        total = np.where(fix, away, total)
    return total.astype(np.float32)


_libm = ctypes.CDLL("libm.so.6")
_libm.fma.restype = ctypes.c_double
_libm.fma.argtypes = [ctypes.c_double] * 3
fma64 = np.vectorize(lambda a, b, c: _libm.fma(a, b, c), otypes=[np.float64])


def directed(exact, mode: str):
    """float64 rounded to float32 towards zero (rz), down (rm) or up (rp)."""
    nearest = exact.astype(np.float32)
    back = nearest.astype(np.float64)
    if mode == "rz":
        wrong, towards = np.abs(back) > np.abs(exact), np.float32(0)
    elif mode == "rm":
        wrong, towards = back > exact, np.float32(-np.inf)
    else:
        wrong, towards = back < exact, np.float32(np.inf)
    return np.where(wrong, np.nextafter(nearest, towards), nearest)


def extremum(a, b, largest: bool):
    """max or min: the number where one is NaN, and +0 above -0 (PTX ISA, 9.7.3.11)."""
    r = np.fmax(a, b) if largest else np.fmin(a, b)
    r = np.atleast_1d(r)
    equal = a == b
    if not np.any(equal):
        return r
    bits = UNSIGNED[r.dtype.itemsize]
    x, y = (np.broadcast_to(v, r.shape).astype(r.dtype).view(bits) for v in (a, b))
    return np.where(equal, (x & y if largest else x | y).view(r.dtype), r)
