"""The scalar formulas of csrc/scalar_math.h, from what every target and the interpreter have."""

import os

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# ln 2 in two parts: the first has trailing zeros, so that a small integer times it is exact
LN_2_HIGH = tl.constexpr(0.693145751953125)
LN_2_LOW = tl.constexpr(1.4286068203094172e-06)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
NVIDIA = tl.constexpr(not INTERPRETED and torch.version.hip is None)
HUGE = tl.constexpr(2.0**126)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def fma(a, b, c):
    """a * b + c, rounded once."""
    if INTERPRETED:
        # the interpreter's own rounds the product as well; in float64 the product is exact
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 to the nearest dtype, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # the interpreter truncates: round to the bits that it keeps, but not a NaN
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
    else:
        return x.to(dtype)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, relatively accurate down to the smallest x."""
    u = 1.0 + x
    # what the addition rounded away, to first order
    lost = (x - (u - 1.0)) / u
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    # log(1 + f) = 2 atanh(s), as f minus a small term so that f enters exactly
    s = f / (2.0 + f)
    z = s * s
    series = z * (2.0 / 3 + z * (2.0 / 5 + z * (2.0 / 7 + z * (2.0 / 9))))
    k = exponent.to(tl.float32)
    result = k * LN_2_HIGH + (f - (s * (f - series) - (k * LN_2_LOW + lost)))
    # the bit operations turned a NaN into a number
    return tl.where(x == x, result, x)


@triton.jit
def split_exp(x):
    """(2^n, expm1(r)) with x = n ln 2 + r and |r| <= ln 2 / 2, for x <= 0."""
    x = tl.where(x < -150.0, -150.0, x)
    n = tl.floor(x * LOG2_E + 0.5)
    r = (x - n * LN_2_HIGH) - n * LN_2_LOW
    tail = 1.0 + r / 6 * (1.0 + r / 7 * (1.0 + r / 8))
    tail = 1.0 + r / 3 * (1.0 + r / 4 * (1.0 + r / 5 * tail))
    return tl.exp2(n), r * (1.0 + r / 2 * tail)


@triton.jit
def exp(x):
    """e^x for x <= 0 to about an ulp; the hardware's is off by |x| ulps."""
    power, rest = split_exp(x)
    return power + power * rest


@triton.jit
def one_minus_exp(x):
    """-expm1(x) for x <= 0, relatively accurate down to the smallest -x."""
    power, rest = split_exp(x)
    return (1.0 - power) - power * rest


@triton.jit
def reciprocal(x):
    """1 / x to an ulp, for x from 1 to 2^127."""
    if NVIDIA:
        # a division would guard against results and operands out of this range
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def tanh(x):
    """(tanh x, 1 - tanh^2 x), elementwise, to 3e-7: 1 - 2 / (e^2x + 1) needs no care for the sign.

    The derivative is relatively accurate on both sides, down to 1e-37.
    """
    e = tl.exp2(x * (2.0 * LOG2_E))
    r = reciprocal(1.0 + e)
    far = fma(r, -2.0, 1.0)
    # it cancels near 0: x + x^3 P(x^2), with P's error below 1.3e-8 for |x| < 0.3
    z = x * x
    series = fma(fma(z, -0.05035468, 0.13314674), z, -0.33333056)
    value = tl.where(z < 0.09, fma(x, z * series, x), far)
    return value, 4.0 * (tl.minimum(e, HUGE) * r * r)


@triton.jit
def enlarged(x, SCALE: tl.constexpr):
    """x / SCALE, a mean whose terms were made smaller by SCALE, a power of two, before they were
    added: finite where x is, whichever way the sum was rounded."""
    limit: tl.constexpr = SCALE * LARGEST
    limited = tl.maximum(tl.minimum(x, limit), -limit) * (1.0 / SCALE)
    return tl.where(tl.abs(x) < float("inf"), limited, x)


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - log1p(exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    e = exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def sigmoid_loss(logit, label_smoothing):
    """DPO's loss of one pair with cDPO smoothing, and its derivative."""
    keep = 1.0 - label_smoothing
    loss = -keep * log_sigmoid(logit)
    # without smoothing its term is 0 * inf where the rejected answer has no chance
    loss -= tl.where(label_smoothing == 0.0, 0.0, label_smoothing * log_sigmoid(-logit))
    derivative = label_smoothing * sigmoid(logit) - keep * sigmoid(-logit)
    return loss, derivative
