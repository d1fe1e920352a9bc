"""The states of a row's segments: gathered by one program, or exchanged between several."""

import triton
import triton.language as tl

from .row_reduction import NO_MAX


@triton.jit
def store_state(pointer, field_stride, state, STATS: tl.constexpr):
    maximum, sum_, weighted, squares, total, beaten = state
    tl.store(pointer, maximum)
    tl.store(pointer + field_stride, sum_)
    if STATS:
        tl.store(pointer + 2 * field_stride, weighted)
        tl.store(pointer + 3 * field_stride, squares)
        tl.store(pointer + 4 * field_stride, total)
        tl.store(pointer + 5 * field_stride, beaten.to(tl.float32))


@triton.jit
def load_states(pointer, field_stride, count, SIZE: tl.constexpr, STATS: tl.constexpr):
    """The first ``count`` states; other programs stored them, so past the L1 cache."""
    i = tl.arange(0, SIZE)
    have = i < count
    pointer += i
    maximum = tl.load(pointer, mask=have, other=NO_MAX, cache_modifier=".cg")
    sum_ = tl.load(pointer + field_stride, mask=have, other=0.0, cache_modifier=".cg")
    weighted = sum_
    squares = sum_
    total = sum_
    beaten = sum_
    if STATS:
        weighted = tl.load(pointer + 2 * field_stride, mask=have, other=0.0, cache_modifier=".cg")
        squares = tl.load(pointer + 3 * field_stride, mask=have, other=0.0, cache_modifier=".cg")
        total = tl.load(pointer + 4 * field_stride, mask=have, other=0.0, cache_modifier=".cg")
        beaten = tl.load(pointer + 5 * field_stride, mask=have, other=0.0, cache_modifier=".cg")
    return maximum, sum_, weighted, squares, total, beaten.to(tl.int32)


@triton.jit
def put_state(states, at, state, SIZE: tl.constexpr):
    here = tl.arange(0, SIZE) == at
    maximum, sum_, weighted, squares, total, beaten = states
    maximum_, sum__, weighted_, squares_, total_, beaten_ = state
    return (
        tl.where(here, maximum_, maximum),
        tl.where(here, sum__, sum_),
        tl.where(here, weighted_, weighted),
        tl.where(here, squares_, squares),
        tl.where(here, total_, total),
        tl.where(here, beaten_, beaten),
    )
