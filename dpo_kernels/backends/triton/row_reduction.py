"""One row of logits to its sums, kept relative to its maximum.

With z = unit * u the transformed logits, m the maximum of u, rate = unit / ln 2 and base the float
nearest to m * rate, over all columns but the label's:
    sum = sum 2^(u rate - base)            weighted = sum (u rate - base) 2^(u rate - base)
    squares = sum 2^(2 (u rate - base))    beaten = whether one of them comes before the label
and total = sum u over all columns. The exponent is one fma, rounded after the subtraction, so that
a common offset costs no digits; the label stays out, so that a confident token keeps its.

A state is (m, sum, weighted, squares, total, beaten). A thread reduces its lane of a segment of
SEGMENT columns, the lanes reduce to the segment, and the segments to the row: the same order
whether one program takes the row or one a segment.
"""

import triton
import triton.language as tl

from .common import LANES, tile_columns, transform
from .scalar_math import LN_2, enlarged, exp, fma, log1p

# a power of two, so that it is a multiple of every tile
SEGMENT = tl.constexpr(32768)
NO_MAX = tl.constexpr(float("-inf"))
# |m * rate| up to which its rounding is small enough for an exponent, and 2^exponent finite
FAR_OUT = tl.constexpr(2.0**30)
# stands for a difference of -inf, whose exponential is 0 as well, in products with that 0
FAR = tl.constexpr(-1000.0)


@triton.jit
def base_of(maximum, rate):
    """What to subtract: finite where all is -inf, so far above what lies far below that it adds 0.

    A maximum beyond FAR_OUT has no useful base; reduce_far then makes the sums of the row anew.
    """
    return tl.maximum(maximum * rate, -FAR_OUT)


@triton.jit
def tile_max(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def tile_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def add_tile(state, u, total_here, before_label, target, rate, STATS: tl.constexpr):
    """A tile into the lanes' state; total_here is their sum of u, the label's column included."""
    old, sum_, weighted, squares, total, beaten = state
    highest = tile_max(u)
    maximum = tl.maximum(old, highest)
    base = base_of(maximum, rate)
    exponent = fma(u, rate, -base[None, :, None])
    p = tl.exp2(exponent)
    shift = tl.maximum(old * rate - base, FAR)
    decay = tl.exp2(shift)
    if STATS:
        weighted = decay * (weighted + shift * sum_) + tile_sum(p * tl.maximum(exponent, FAR))
        squares = decay * decay * squares + tile_sum(p * p)
        total += total_here
        beaten |= tl.where(before_label, highest >= target, highest > target).to(tl.int32)
    sum_ = decay * sum_ + tile_sum(p)
    return maximum, sum_, weighted, squares, total, beaten


@triton.jit
def add_edge_tile(state, u, columns, count, label, target, rate, STATS: tl.constexpr):
    """A tile of ``count`` columns of which ``label`` may be one."""
    inside = columns < count
    maximum, sum_, weighted, squares, total, beaten = state
    total_here = 0.0
    if STATS:
        total_here = tile_sum(tl.where(inside, u, 0.0))
        beaten |= tile_max((inside & (columns < label) & (u >= target)).to(tl.int32))
    u = tl.where(inside & (columns != label), u, NO_MAX)
    state = maximum, sum_, weighted, squares, total, beaten
    return add_tile(state, u, total_here, False, target, rate, STATS)


@triton.jit
def combine(state, rate, STATS: tl.constexpr):
    """The states along an axis to one, in the order of the axis."""
    each, sum_, weighted, squares, total, beaten = state
    maximum = tl.max(each, 0)
    shift = tl.maximum(each * rate - base_of(maximum, rate), FAR)
    factor = tl.exp2(shift)
    row_sum = tl.sum(factor * sum_, 0)
    if STATS:
        weighted = tl.sum(factor * (weighted + shift * sum_), 0)
        squares = tl.sum(factor * factor * squares, 0)
        return maximum, row_sum, weighted, squares, tl.sum(total, 0), tl.max(beaten, 0)
    else:
        return maximum, row_sum, 0.0, 0.0, 0.0, 0


@triton.jit
def empty_state(SIZE: tl.constexpr):
    zero = tl.zeros([SIZE], tl.float32)
    return tl.full([SIZE], NO_MAX, tl.float32), zero, zero, zero, zero, zero.to(tl.int32)


@triton.jit
def reduce_segment(
    row, begin, vocab, label, target, rate, inner,
    TRANSFORM: tl.constexpr, STATS: tl.constexpr, ELEMENTS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = ELEMENTS * LANES
    # narrow loads would be kept in flight in registers, at the price of programs on the processor
    STAGES: tl.constexpr = 4 if VECTOR > 1 else 1
    columns = tile_columns(ELEMENTS, VECTOR)
    end = tl.minimum(begin + SEGMENT, vocab)
    full_end = begin + (end - begin) // TILE * TILE
    # the label's tile and the incomplete one come last, so that the loop is without selects
    label_tile = full_end
    loop_end = full_end
    if (label >= begin) & (label < full_end):
        label_tile = begin + (label - begin) // TILE * TILE
        loop_end = full_end - TILE
    state = empty_state(LANES)
    for start in tl.range(begin, loop_end, TILE, num_stages=STAGES):
        at = start + tl.where(start >= label_tile, TILE, 0)
        u, _ = transform(tl.load(row + at + columns), inner, TRANSFORM)
        total_here = tile_sum(u) if STATS else 0.0
        state = add_tile(state, u, total_here, at < label, target, rate, STATS)
    left = tl.multiple_of(end - full_end, VECTOR)
    count = full_end - loop_end
    x_label = tl.load(row + label_tile + columns, mask=columns < count, other=0.0)
    x_left = tl.load(row + full_end + columns, mask=columns < left, other=0.0)
    if count > 0:
        u, _ = transform(x_label, inner, TRANSFORM)
        state = add_edge_tile(state, u, columns, count, label - label_tile, target, rate, STATS)
    if left > 0:
        u, _ = transform(x_left, inner, TRANSFORM)
        state = add_edge_tile(state, u, columns, left, label - full_end, target, rate, STATS)
    return combine(state, rate, STATS)


@triton.jit
def is_far(maximum, total, rate, STATS: tl.constexpr):
    """Whether reduce_far must make the sums of a row: the maximum has no base, or total no float.

    With statistics a row that has a -inf is far too, for its total, which comes out as -inf again.
    """
    far = (tl.abs(maximum * rate) > FAR_OUT) & (maximum > NO_MAX)
    if STATS:
        far |= tl.abs(total) == float("inf")
        far |= total != total
    return far


@triton.jit
def reduce_far(
    row, vocab, label, maximum, rate, inner, TRANSFORM: tl.constexpr, STATS: tl.constexpr
):
    """(sum, weighted, squares, mean of u) of a whole row, relative to its maximum, not to a base.

    The difference is taken before the product, which costs an instruction more for every element.
    """
    TILE: tl.constexpr = 4 * LANES
    columns = tl.arange(0, TILE)
    # all is -inf: exponents of -inf, not NaN
    anchor = tl.where(maximum == NO_MAX, 0.0, maximum)
    # half of the mean, so that rounding up cannot make it infinite
    share = tl.math.div_rn(tl.full([], 0.5, tl.float32), vocab.to(tl.float32))
    sum_ = tl.zeros([TILE], tl.float32)
    weighted = sum_
    squares = sum_
    mean = sum_
    for begin in tl.range(0, vocab, TILE, num_stages=1):
        at = begin + columns
        x = tl.load(row + at, mask=at < vocab, other=0.0)
        u, _ = transform(x, inner, TRANSFORM)
        others = (at < vocab) & (at != label)
        exponent = tl.where(others, (u - anchor) * rate, NO_MAX)
        p = tl.exp2(exponent)
        sum_ += p
        if STATS:
            weighted += p * tl.maximum(exponent, FAR)
            squares += p * p
            mean += u * share
    mean_u = enlarged(tl.sum(mean, 0), 0.5)
    return tl.sum(sum_, 0), tl.sum(weighted, 0), tl.sum(squares, 0), mean_u


@triton.jit
def to_top(maximum, error, top, unit):
    """(factor, its logarithm) from sums relative to the base of maximum to relative to top.

    ``error`` is base - maximum * rate.
    """
    distance = (maximum - top) * unit
    # sums over columns that are all -inf, or as good as that, have a base far from their maximum
    far = distance < -150.0
    factor = tl.where(far, 0.0, tl.exp2(error) * exp(distance))
    return factor, tl.where(far, 0.0, error * LN_2 + distance)


@triton.jit
def log_of_sum(others, gap, own):
    """log(others + own), own = e^gap; others includes the maximum's 1 unless it is the label's."""
    return log1p(tl.where(gap == 0.0, others, (others - 1.0) + own))


@triton.jit
def token_logp(maximum, error, sum_, target, unit):
    """(logp, row_max, log_sum) from the label's u and the sum over all other columns."""
    top = tl.maximum(target, maximum)
    factor, _ = to_top(maximum, error, top, unit)
    gap = (target - top) * unit
    log_sum = log_of_sum(factor * sum_, gap, exp(gap))
    row_max = unit * top
    # row_max was rounded; log_sum makes up for it, so that the backward is exact
    return gap - log_sum, row_max, log_sum + fma(top, unit, -row_max)


@triton.jit
def token_stats(maximum, error, sum_, weighted, squares, target, unit):
    """(entropy, log_sum_sq_probs)."""
    top = tl.maximum(target, maximum)
    factor, shift = to_top(maximum, error, top, unit)
    gap = (target - top) * unit
    own = exp(gap)
    log_sum = log_of_sum(factor * sum_, gap, own)
    log_squares = log_of_sum(factor * factor * squares, gap, own * own)
    weighted = factor * (weighted * LN_2 + shift * sum_) + tl.maximum(gap, FAR) * own
    return log_sum - weighted * exp(-log_sum), log_squares - 2.0 * log_sum


@triton.jit
def unless_empty(maximum, sum_, target, value):
    """``value``, but of a shard whose columns are all -inf 0; NaN where one of them is NaN."""
    return tl.where((maximum == NO_MAX) & (target == NO_MAX), sum_, value)


@triton.jit
def shard_token(maximum, sum_, target, unit, column, logp, log_sum):
    """(label's z, log_sum) of a shard, to be merged with the others', from what token_logp made.

    The z of a label that lies elsewhere is 0.
    """
    # z is rounded like row_max where it is the maximum: then log_sum has nothing to make up for
    log_sum = tl.where(target >= maximum, -logp, log_sum)
    return tl.where(column >= 0, unit * target, 0.0), unless_empty(maximum, sum_, target, log_sum)
