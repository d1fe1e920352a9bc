"""Backward: every scored row is read once and written once, every other row only zeroed.

dlogits = c (onehot - softmax(z)) dz/dx, with c looked up for the row's token, sequence or pair.
"""

import triton
import triton.language as tl

from .common import BATCH_ARGS, LANES, find_token, local_column, row_offset, transform
from .scalar_math import LOG2_E, exp, fma, one_minus_exp, round_to

# columns of one program, a multiple of every tile
CHUNK = tl.constexpr(32768)

RUNTIME_ARGS = [
    *BATCH_ARGS,
    *("tokens", "scale", "grad", "grad_stride"),
    *("grad_logits", "grad_seq_stride", "grad_row_stride", "zero_unscored"),
]


@triton.jit
def coefficient(scale, grad, grad_stride, num_seqs, token, seq, GRAD_INDEX: tl.constexpr):
    if GRAD_INDEX == "token":
        c = tl.load(grad + grad_stride * token)
    elif GRAD_INDEX == "sequence":
        c = tl.load(grad + grad_stride * seq)
    else:
        c = tl.load(grad + grad_stride * (seq % (num_seqs // 2)))
    if scale is not None:
        c *= tl.load(scale + seq)
    return c


@triton.jit
def gradient(x, unit, inner, row_max, factor, TRANSFORM: tl.constexpr):
    """-c softmax(z) dz/dx, with factor = -c / sum exp(z - row_max)."""
    u, derivative = transform(x, inner, TRANSFORM)
    return factor * tl.exp2(fma(u, unit, -row_max) * LOG2_E) * derivative


@triton.jit(do_not_specialize=RUNTIME_ARGS)
def backward_kernel(
    logits, labels, cu_seqlens, tokens, scale, grad, grad_logits,
    seq_stride: tl.int64, row_stride: tl.int64,
    label_seq_stride: tl.int64, label_row_stride: tl.int64,
    num_seqs: tl.int64, seq_len: tl.int64, num_tokens: tl.int64,
    vocab: tl.int32, vocab_start: tl.int64, ignore_index: tl.int64, shift: tl.int32,
    unit: tl.float32, inner: tl.float32, dz_dx: tl.float32,
    grad_stride: tl.int64, grad_seq_stride: tl.int64, grad_row_stride: tl.int64,
    zero_unscored: tl.int32,
    TRANSFORM: tl.constexpr, GRAD_INDEX: tl.constexpr,
    ELEMENTS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program a row and chunk of columns. dz_dx is the constant factor of the derivative."""
    TILE: tl.constexpr = ELEMENTS * LANES
    DTYPE: tl.constexpr = grad_logits.dtype.element_ty
    STAGES: tl.constexpr = 3 if VECTOR > 1 else 1
    BYTES: tl.constexpr = VECTOR * logits.dtype.element_ty.primitive_bitwidth // 8
    GRAD_BYTES: tl.constexpr = VECTOR * grad_logits.dtype.element_ty.primitive_bitwidth // 8
    # last rows first: they are what the forward left in the cache, and the next reader starts at 0
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    chunks = (vocab + CHUNK - 1) // CHUNK
    row = program // chunks
    begin = (program % chunks).to(tl.int32) * CHUNK
    end = tl.minimum(begin + CHUNK, vocab)
    columns = tl.arange(0, TILE)

    seq, start, seq_end = find_token(cu_seqlens, row, num_seqs, seq_len, num_tokens)
    token = row + shift
    label = ignore_index
    if (seq >= 0) & (token < seq_end):
        place = row_offset(cu_seqlens, seq, start, token, label_seq_stride, label_row_stride)
        label = tl.load(labels + place)
    out = grad_logits + row_offset(cu_seqlens, seq, start, row, grad_seq_stride, grad_row_stride)
    out = tl.multiple_of(out, GRAD_BYTES)
    full_end = begin + (end - begin) // TILE * TILE
    left = tl.multiple_of(end - full_end, VECTOR)
    if label == ignore_index:
        if zero_unscored != 0:
            zeros = tl.zeros([TILE], DTYPE)
            for at in range(begin, full_end, TILE):
                tl.store(out + at + columns, zeros)
            tl.store(out + full_end + columns, zeros, mask=columns < left)
    else:
        x_row = logits + row_offset(cu_seqlens, seq, start, row, seq_stride, row_stride)
        x_row = tl.multiple_of(x_row, BYTES)
        # a label outside the vocabulary left NaN in tokens
        column = local_column(label, vocab_start, begin, end)
        c = dz_dx * coefficient(scale, grad, grad_stride, num_seqs, token, seq, GRAD_INDEX)
        row_max = tl.load(tokens + num_tokens + token)
        factor = -c * exp(-tl.load(tokens + 2 * num_tokens + token))
        own = c * one_minus_exp(tl.load(tokens + token))
        if TRANSFORM == "softcap":
            label_x = tl.load(x_row + column, mask=column >= 0, other=0.0)
            _, derivative = transform(label_x, inner, TRANSFORM)
            own *= derivative
            # in place another thread overwrites it
            tl.debug_barrier()
        for at in tl.range(begin, full_end, TILE, num_stages=STAGES):
            x = tl.load(x_row + at + columns, eviction_policy="evict_first")
            dx = gradient(x, unit, inner, row_max, factor, TRANSFORM)
            tl.store(out + at + columns, round_to(dx, DTYPE))
        if left > 0:
            inside = columns < left
            x = tl.load(x_row + full_end + columns, mask=inside, eviction_policy="evict_first")
            dx = gradient(x, unit, inner, row_max, factor, TRANSFORM)
            tl.store(out + full_end + columns, round_to(dx, DTYPE), mask=inside)
        # the label's, over what the loop stored there: cheaper than a choice for every element
        tl.debug_barrier()
        tl.store(out + column, round_to(own, DTYPE), mask=column >= 0)
