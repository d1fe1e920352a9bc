"""Sequence sums, the pair loss and the scalar loss, each made by the program that arrives last."""

import triton
import triton.language as tl

from .common import row_offset
from .scalar_math import sigmoid_loss

CHUNK = tl.constexpr(1024)


@triton.jit
def arrive(counter, amount, expected):
    """True in the program whose ``amount`` makes the counter, 0 at first, ``expected``.

    It then sees what all that arrived before it stored.
    """
    # every thread's stores come before the release of the one thread that counts
    tl.debug_barrier()
    last = tl.atomic_add(counter, amount, sem="acq_rel", scope="gpu") == expected - amount
    # and no thread loads before its acquire
    tl.debug_barrier()
    return last


@triton.jit
def fixed_order_sum(values, count):
    """The sum of values[:count] in float64; its order depends on count alone, and zeros behind add
    nothing."""
    total = tl.zeros([CHUNK], tl.float64)
    for begin in range(0, count, CHUNK):
        i = begin + tl.arange(0, CHUNK)
        # other programs wrote these: past the L1 cache
        value = tl.load(values + i, mask=i < count, other=0.0, cache_modifier=".cg")
        total += value.to(tl.float64)
    return tl.sum(total)


@triton.jit
def open_sequence(
    seq, start, end, labels, cu_seqlens, tokens, stats, is_top1, counts,
    label_seq_stride, label_row_stride, num_seqs, num_tokens, ignore_index, shift,
):  # fmt: skip
    """Zeros for the tokens that nothing scores, for which no other program does anything.

    The first and the last sequence of a packed batch take those outside of all sequences. Returns
    the number of scored tokens, which goes to counts.
    """
    first = tl.where(seq == 0, 0, start)
    past = tl.where(seq == num_seqs - 1, num_tokens, end)
    scored = tl.zeros([CHUNK], tl.int32)
    zeros = tl.zeros([CHUNK], tl.float32)
    for begin in range(first, past, CHUNK):
        token = begin + tl.arange(0, CHUNK)
        inside = (token >= start + shift) & (token < end)
        offset = row_offset(cu_seqlens, seq, start, token, label_seq_stride, label_row_stride)
        label = tl.load(labels + offset, mask=inside, other=ignore_index)
        blank = (token < past) & (label == ignore_index)
        scored += (label != ignore_index).to(tl.int32)
        for field in tl.static_range(3):
            tl.store(tokens + field * num_tokens + token, zeros, mask=blank)
            if stats is not None:
                tl.store(stats + field * num_tokens + token, zeros, mask=blank)
        if stats is not None:
            tl.store(is_top1 + token, blank & False, mask=blank)
    count = tl.sum(scored)
    tl.store(counts + seq, count.to(tl.int64))
    return count


@triton.jit
def finish_sequence(
    seq, start, end, tokens, seqs, counts, reference, losses, loss, counters,
    num_seqs, beta, label_smoothing, weight, AVERAGE: tl.constexpr,
):  # fmt: skip
    scale = tl.full([], 1.0, tl.float32)
    logp = fixed_order_sum(tokens + start, end - start)
    if AVERAGE:
        count = tl.load(counts + seq, cache_modifier=".cg")
        divisor = tl.maximum(count, 1)
        logp /= divisor.to(tl.float64)
        scale = tl.math.div_rn(scale, divisor.to(tl.float32))
    tl.store(seqs + seq, logp.to(tl.float32))
    tl.store(seqs + num_seqs + seq, scale)
    if losses is not None:
        num_pairs = num_seqs // 2
        pair = seq % num_pairs
        if arrive(counters + num_seqs + pair, 1, 2):
            finish_pair(pair, num_pairs, seqs, reference, losses, beta, label_smoothing, weight)
            if arrive(counters + num_seqs + num_pairs, 1, num_pairs):
                total = weight * fixed_order_sum(losses, num_pairs)
                tl.store(loss, total.to(tl.float32))


@triton.jit
def finish_pair(pair, num_pairs, seqs, reference, losses, beta, label_smoothing, weight):
    num_seqs = 2 * num_pairs
    chosen = tl.load(seqs + pair, cache_modifier=".cg")
    rejected = tl.load(seqs + pair + num_pairs, cache_modifier=".cg")
    if reference is not None:
        chosen -= tl.load(reference + pair)
        rejected -= tl.load(reference + pair + num_pairs)
    pair_loss, derivative = sigmoid_loss(beta * (chosen - rejected), label_smoothing)
    tl.store(losses + pair, pair_loss)
    rewards = seqs + 2 * num_seqs + pair
    tl.store(rewards, beta * chosen)
    tl.store(rewards + num_pairs, beta * rejected)
    # the scale of each sequence stands there already; the loss turns it into dloss/dlogp
    scales = seqs + num_seqs + pair
    gradient = weight * beta * derivative
    chosen_scale = tl.load(scales, cache_modifier=".cg")
    rejected_scale = tl.load(scales + num_pairs, cache_modifier=".cg")
    # every thread loads what one thread overwrites
    tl.debug_barrier()
    tl.store(scales, gradient * chosen_scale)
    tl.store(scales + num_pairs, -gradient * rejected_scale)
