"""Sequence sums, the pair loss and the scalar loss, each made by the program that arrives last."""

import triton
import triton.language as tl

from .common import row_offset
from .scalar_math import sigmoid_loss

CHUNK = tl.constexpr(1024)


@triton.jit
def arrive(counter, expected):
    """True in the last of ``expected`` programs, which then sees what the others stored.

    The counter is left at 0 for the next launch, also for one replayed by a CUDA graph.
    """
    # every thread's stores come before the release of the one thread that counts
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter, 0)
    # and no thread loads before its acquire
    tl.debug_barrier()
    return last


@triton.jit
def fixed_order_sum(values, count):
    """The sum of values[:count]; its order depends on count alone, and zeros behind add nothing."""
    total = tl.zeros([CHUNK], tl.float32)
    for begin in range(0, count, CHUNK):
        i = begin + tl.arange(0, CHUNK)
        # other programs wrote these: past the L1 cache
        total += tl.load(values + i, mask=i < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total)


@triton.jit
def finish_sequence(
    seq, start, end, labels, cu_seqlens, tokens, seqs, counts, reference, losses, loss, counters,
    label_seq_stride, label_row_stride, num_seqs, ignore_index, shift,
    beta, label_smoothing, weight, AVERAGE: tl.constexpr,
):  # fmt: skip
    logp = fixed_order_sum(tokens + start, end - start)
    scored = tl.zeros([CHUNK], tl.int32)
    for begin in range(0, end - start, CHUNK):
        i = begin + tl.arange(0, CHUNK)
        offset = row_offset(cu_seqlens, seq, start, start + i, label_seq_stride, label_row_stride)
        label = tl.load(labels + offset, mask=i < end - start, other=ignore_index)
        scored += ((label != ignore_index) & (i >= shift)).to(tl.int32)
    count = tl.sum(scored)
    tl.store(counts + seq, count.to(tl.int64))
    scale = tl.full([], 1.0, tl.float32)
    if AVERAGE:
        divisor = tl.maximum(count, 1).to(tl.float32)
        logp = tl.math.div_rn(logp, divisor)
        scale = tl.math.div_rn(scale, divisor)
    tl.store(seqs + seq, logp)
    tl.store(seqs + num_seqs + seq, scale)
    if losses is not None:
        num_pairs = num_seqs // 2
        pair = seq % num_pairs
        if arrive(counters + num_seqs + pair, 2):
            finish_pair(pair, num_pairs, seqs, reference, losses, beta, label_smoothing, weight)
            if arrive(counters + num_seqs + num_pairs, num_pairs):
                tl.store(loss, weight * fixed_order_sum(losses, num_pairs))


@triton.jit
def finish_pair(pair, num_pairs, seqs, reference, losses, beta, label_smoothing, weight):
    num_seqs = 2 * num_pairs
    chosen = tl.load(seqs + pair, cache_modifier=".cg")
    rejected = tl.load(seqs + pair + num_pairs, cache_modifier=".cg")
    if reference is not None:
        chosen -= tl.load(reference + pair)
        rejected -= tl.load(reference + pair + num_pairs)
    pair_loss, slope = sigmoid_loss(beta * (chosen - rejected), label_smoothing)
    tl.store(losses + pair, pair_loss)
    rewards = seqs + 2 * num_seqs + pair
    tl.store(rewards, beta * chosen)
    tl.store(rewards + num_pairs, beta * rejected)
    # the scale of each sequence stands there already; the loss turns it into dloss/dlogp
    scales = seqs + num_seqs + pair
    gradient = weight * beta * slope
    chosen_scale = tl.load(scales, cache_modifier=".cg")
    rejected_scale = tl.load(scales + num_pairs, cache_modifier=".cg")
    # every thread loads what one thread overwrites
    tl.debug_barrier()
    tl.store(scales, gradient * chosen_scale)
    tl.store(scales + num_pairs, -gradient * rejected_scale)
