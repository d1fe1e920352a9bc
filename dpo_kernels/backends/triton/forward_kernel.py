"""Forward: every scored row is read once, and one launch makes everything up to the scalar loss."""

import triton
import triton.language as tl

from .common import BATCH_ARGS, find_token, row_offset, seq_bounds, transform
from .epilogue import arrive, finish_sequence
from .row_reduction import (
    SEGMENT,
    combine,
    empty_state,
    load_states,
    put_state,
    reduce_segment,
    store_state,
    token_logp,
    token_stats,
)
from .scalar_math import LOG2_E

RUNTIME_ARGS = [
    *BATCH_ARGS,
    *("tokens", "stats", "is_top1", "seqs", "counts"),
    *("reference", "losses", "loss", "partials", "counters"),
]


@triton.jit
def store_token(tokens, stats, is_top1, token, num_tokens, logps, statistics):
    logp, row_max, log_sum = logps
    tl.store(tokens + token, logp)
    tl.store(tokens + num_tokens + token, row_max)
    tl.store(tokens + 2 * num_tokens + token, log_sum)
    if stats is not None:
        entropy, mean_logits, log_sum_sq_probs, top1 = statistics
        tl.store(stats + token, entropy)
        tl.store(stats + num_tokens + token, mean_logits)
        tl.store(stats + 2 * num_tokens + token, log_sum_sq_probs)
        tl.store(is_top1 + token, top1)


# An output that is None is not wanted; like a constexpr flag, it selects a compilation. No other
# property of a tensor and no integer may: alignment comes as VECTOR.
@triton.jit(do_not_specialize=RUNTIME_ARGS)
def forward_kernel(
    logits, labels, cu_seqlens,
    tokens, stats, is_top1, seqs, counts, reference, losses, loss, partials, counters,
    seq_stride: tl.int64, row_stride: tl.int64,
    label_seq_stride: tl.int64, label_row_stride: tl.int64,
    num_seqs: tl.int64, seq_len: tl.int64, num_tokens: tl.int64,
    vocab: tl.int32, ignore_index: tl.int64, shift: tl.int32,
    unit: tl.float32, inner: tl.float32, softcap: tl.float32,
    beta: tl.float32, label_smoothing: tl.float32, weight: tl.float32,
    TRANSFORM: tl.constexpr, AVERAGE: tl.constexpr, SPLIT: tl.constexpr,
    SEGMENTS: tl.constexpr, ELEMENTS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Programs: one a sequence, where those are wanted, so that empty ones finish; then the tokens.

    With SPLIT a token has one program a segment, and the last of them to arrive goes on.
    """
    STATS: tl.constexpr = stats is not None
    BYTES: tl.constexpr = VECTOR * logits.dtype.element_ty.primitive_bitwidth // 8
    program = tl.program_id(0).to(tl.int64)
    seq_programs = num_seqs * 0 if seqs is None else num_seqs
    segments = (vocab + SEGMENT - 1) // SEGMENT
    seq = program
    start = program * 0
    end = start
    complete = True
    if program < seq_programs:
        start, end = seq_bounds(cu_seqlens, seq, seq_len, num_tokens)
    else:
        token = program - seq_programs
        segment = 0
        if SPLIT:
            segment = ((program - seq_programs) % segments).to(tl.int32)
            token = (program - seq_programs) // segments
        seq, start, end = find_token(cu_seqlens, token, num_seqs, seq_len, num_tokens)
        label = ignore_index
        if (seq >= 0) & (token - start >= shift):
            place = row_offset(cu_seqlens, seq, start, token, label_seq_stride, label_row_stride)
            label = tl.load(labels + place)
        if (label >= 0) & (label < vocab) & (label != ignore_index):
            column = label.to(tl.int32)
            row = logits + row_offset(cu_seqlens, seq, start, token - shift, seq_stride, row_stride)
            row = tl.multiple_of(row, BYTES)
            rate = unit * LOG2_E
            target, _ = transform(tl.load(row + column), inner, softcap, TRANSFORM)
            if SPLIT:
                state = reduce_segment(
                    row, segment * SEGMENT, vocab, column, target, rate, inner, softcap,
                    TRANSFORM, STATS, ELEMENTS, VECTOR,
                )  # fmt: skip
                place = token * segments
                field_stride = num_tokens * segments
                store_state(partials + place + segment, field_stride, state, STATS)
                complete = arrive(counters + 2 * num_seqs + 1 + token, segments)
                # only the last to arrive may read what the others wrote
                arrived = tl.where(complete, segments, 0)
                states = load_states(partials + place, field_stride, arrived, SEGMENTS, STATS)
            else:
                states = empty_state(SEGMENTS)
                for k in range(segments):
                    state = reduce_segment(
                        row, k * SEGMENT, vocab, column, target, rate, inner, softcap,
                        TRANSFORM, STATS, ELEMENTS, VECTOR,
                    )  # fmt: skip
                    states = put_state(states, k, state, SEGMENTS)
            if complete:
                state = combine(states, rate, STATS)
                logps = token_logp(state, target, unit, rate)
                statistics = token_stats(state, target, unit, rate, vocab)
                store_token(tokens, stats, is_top1, token, num_tokens, logps, statistics)
        else:
            complete = segment == 0
            if complete:
                fill = tl.where(label == ignore_index, 0.0, float("nan"))
                logps = fill, fill, fill
                statistics = fill, fill, fill, False
                store_token(tokens, stats, is_top1, token, num_tokens, logps, statistics)
    # nested, since Triton evaluates both sides of an `and`
    if seqs is not None:  # noqa: SIM102
        if complete & (seq >= 0):  # noqa: SIM102
            if arrive(counters + seq, end - start + 1):
                finish_sequence(
                    seq, start, end, labels, cu_seqlens, tokens, seqs, counts, reference, losses,
                    loss, counters, label_seq_stride, label_row_stride, num_seqs, ignore_index,
                    shift, beta, label_smoothing, weight, AVERAGE,
                )  # fmt: skip
