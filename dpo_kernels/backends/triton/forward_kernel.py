"""Forward: every scored row is read once, and one launch makes everything up to the scalar loss."""

import triton
import triton.language as tl

from .common import (
    BATCH_ARGS,
    find_token,
    local_column,
    padded_seq,
    row_offset,
    seq_bounds,
    transform,
)
from .epilogue import arrive, finish_sequence, open_sequence
from .partials import load_states, put_state, store_state
from .row_reduction import (
    NO_MAX,
    SEGMENT,
    base_of,
    combine,
    empty_state,
    is_far,
    reduce_far,
    reduce_segment,
    shard_token,
    token_logp,
    token_stats,
    unless_empty,
)
from .scalar_math import LOG2_E, fma

RUNTIME_ARGS = [
    *(*BATCH_ARGS, "labels_below"),
    *("tokens", "stats", "is_top1", "seqs", "counts"),
    *("reference", "losses", "loss", "partials", "counters"),
]


@triton.jit
def store_token(
    tokens, stats, is_top1, token, num_tokens,
    logp, row_max, log_sum, entropy, mean_logits, log_sum_sq_probs, top1,
):  # fmt: skip
    tl.store(tokens + token, logp)
    tl.store(tokens + num_tokens + token, row_max)
    tl.store(tokens + 2 * num_tokens + token, log_sum)
    if stats is not None:
        tl.store(stats + token, entropy)
        tl.store(stats + num_tokens + token, mean_logits)
        tl.store(stats + 2 * num_tokens + token, log_sum_sq_probs)
        tl.store(is_top1 + token, top1)


@triton.jit
def finish_token(
    tokens, stats, is_top1, token, num_tokens, states,
    row, vocab, column, target, unit, rate, inner,
    TRANSFORM: tl.constexpr, STATS: tl.constexpr, SHARD: tl.constexpr,
):  # fmt: skip
    """The outputs of a token from the states of its row's segments."""
    maximum, sum_, weighted, squares, total, beaten = combine(states, rate, STATS)
    error = fma(-maximum, rate, base_of(maximum, rate))
    mean = tl.math.div_rn(total, vocab.to(tl.float32)) if STATS else sum_
    if is_far(maximum, total, rate, STATS):
        far_sum, far_weighted, far_squares, far_mean = reduce_far(
            row, vocab, column, maximum, rate, inner, TRANSFORM, STATS
        )
        # what the maximum does not spoil keeps the bits that it has without statistics
        moves = is_far(maximum, total, rate, False)
        error = tl.where(moves, 0.0, error)
        sum_ = tl.where(moves, far_sum, sum_)
        if STATS:
            weighted = tl.where(moves, far_weighted, weighted)
            squares = tl.where(moves, far_squares, squares)
            mean = far_mean
    logp, row_max, log_sum = token_logp(maximum, error, sum_, target, unit)
    entropy = logp
    log_squares = logp
    top1 = beaten == 0
    if STATS:
        entropy, log_squares = token_stats(maximum, error, sum_, weighted, squares, target, unit)
    if SHARD:
        logp, log_sum = shard_token(maximum, sum_, target, unit, column, logp, log_sum)
        entropy = unless_empty(maximum, sum_, target, entropy)
        log_squares = unless_empty(maximum, sum_, target, log_squares)
        top1 &= column >= 0
    store_token(
        tokens, stats, is_top1, token, num_tokens,
        logp, row_max, log_sum, entropy, unit * mean, log_squares, top1,
    )  # fmt: skip


# An output that is None is not wanted; like a constexpr flag, it selects a compilation. No other
# property of a tensor and no integer may: alignment comes as VECTOR.
@triton.jit(do_not_specialize=RUNTIME_ARGS)
def forward_kernel(
    logits, labels, cu_seqlens,
    tokens, stats, is_top1, seqs, counts, reference, losses, loss, partials, counters,
    seq_stride: tl.int64, row_stride: tl.int64,
    label_seq_stride: tl.int64, label_row_stride: tl.int64,
    num_seqs: tl.int64, seq_len: tl.int64, num_tokens: tl.int64,
    vocab: tl.int32, vocab_start: tl.int64, labels_below: tl.int64,
    ignore_index: tl.int64, shift: tl.int32,
    unit: tl.float32, inner: tl.float32,
    beta: tl.float32, label_smoothing: tl.float32, weight: tl.float32,
    TRANSFORM: tl.constexpr, AVERAGE: tl.constexpr, SPLIT: tl.constexpr, SHARD: tl.constexpr,
    SEGMENTS: tl.constexpr, ELEMENTS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Programs: one per sequence unless seqs is None, then those of the tokens.

    The program of a sequence arrives for all its tokens that nothing scores, so that those cost
    their label and nothing else. With SPLIT a token has one program a segment, and the last of them
    to arrive goes on.
    """
    STATS: tl.constexpr = stats is not None
    BYTES: tl.constexpr = VECTOR * logits.dtype.element_ty.primitive_bitwidth // 8
    program = tl.program_id(0).to(tl.int64)
    seq_programs = num_seqs * 0 if seqs is None else num_seqs
    segments = (vocab + SEGMENT - 1) // SEGMENT
    seq = program
    start = program * 0
    end = start
    # how many of the sequence's tokens, and itself, this program arrives for
    arrivals = tl.full([], 0, tl.int32)
    if program < seq_programs:
        if seqs is not None:
            start, end = seq_bounds(cu_seqlens, seq, seq_len, num_tokens)
            count = open_sequence(
                seq, start, end, labels, cu_seqlens, tokens, stats, is_top1, counts,
                label_seq_stride, label_row_stride, num_seqs, num_tokens, ignore_index, shift,
            )  # fmt: skip
            arrivals = (end - start + 1).to(tl.int32) - count
    else:
        token = program - seq_programs
        segment = 0
        if SPLIT:
            segment = ((program - seq_programs) % segments).to(tl.int32)
            token = (program - seq_programs) // segments
        seq, start = padded_seq(cu_seqlens, token, seq_len)
        place = row_offset(cu_seqlens, seq, start, token, label_seq_stride, label_row_stride)
        label = tl.load(labels + place)
        scored = label != ignore_index
        if scored:
            seq, start, end = find_token(cu_seqlens, token, num_seqs, seq_len, num_tokens)
            scored = (seq >= 0) & (token - start >= shift)
        if scored & (label >= 0) & (label < labels_below):
            column = local_column(label, vocab_start, 0, vocab)
            row = logits + row_offset(cu_seqlens, seq, start, token - shift, seq_stride, row_stride)
            row = tl.multiple_of(row, BYTES)
            rate = unit * LOG2_E
            x_label = tl.load(row + column, mask=column >= 0, other=0.0)
            target, _ = transform(x_label, inner, TRANSFORM)
            # as if a label of another shard had no chance here
            target = tl.where(column >= 0, target, NO_MAX)
            if SPLIT:
                state = reduce_segment(
                    row, segment * SEGMENT, vocab, column, target, rate, inner,
                    TRANSFORM, STATS, ELEMENTS, VECTOR,
                )  # fmt: skip
                place = token * segments
                field_stride = num_tokens * segments
                store_state(partials + place + segment, field_stride, state, STATS)
                complete = arrive(counters + 2 * num_seqs + 1 + token, 1, segments)
                # only the last to arrive may read what the others wrote
                stored = tl.where(complete, segments, 0)
                states = load_states(partials + place, field_stride, stored, SEGMENTS, STATS)
            else:
                complete = True
                states = empty_state(SEGMENTS)
                for k in range(segments):
                    state = reduce_segment(
                        row, k * SEGMENT, vocab, column, target, rate, inner,
                        TRANSFORM, STATS, ELEMENTS, VECTOR,
                    )  # fmt: skip
                    states = put_state(states, k, state, SEGMENTS)
            if complete:
                arrivals += 1
                finish_token(
                    tokens, stats, is_top1, token, num_tokens, states,
                    row, vocab, column, target, unit, rate, inner, TRANSFORM, STATS, SHARD,
                )  # fmt: skip
        elif segment == 0:
            # a label outside the vocabulary; without sequences also a token that nothing scores
            arrivals += scored.to(tl.int32)
            fill = tl.where(scored, float("nan"), 0.0)
            blank = seqs is None
            if scored | blank:
                store_token(
                    tokens, stats, is_top1, token, num_tokens,
                    fill, fill, fill, fill, fill, fill, False,
                )  # fmt: skip
    # nested, since Triton evaluates both sides of an `and`
    if seqs is not None:  # noqa: SIM102
        if arrivals > 0:  # noqa: SIM102
            if arrive(counters + seq, arrivals, (end - start + 1).to(tl.int32)):
                finish_sequence(
                    seq, start, end, tokens, seqs, counts, reference, losses, loss, counters,
                    num_seqs, beta, label_smoothing, weight, AVERAGE,
                )  # fmt: skip
