"""What both kernels share: tiles, look-ups in the layout, the transform of the logits."""

import triton
import triton.language as tl

from .scalar_math import tanh

# a program is LANES threads; a tile is [rows, LANES, vector], so that one thread owns all elements
# of its lane and the loop over a row needs no exchange between threads
LANES = tl.constexpr(256)
FAN_OUT = tl.constexpr(256)

# arguments of both kernels that must not select a compilation
BATCH_ARGS = [
    *("logits", "seq_stride", "row_stride", "vocab", "vocab_start"),
    *("labels", "label_seq_stride", "label_row_stride", "ignore_index", "shift"),
    *("cu_seqlens", "num_seqs", "seq_len", "num_tokens"),
]


@triton.jit
def tile_columns(ELEMENTS: tl.constexpr, VECTOR: tl.constexpr):
    row = tl.arange(0, ELEMENTS // VECTOR)[:, None, None]
    lane = tl.arange(0, LANES)[None, :, None]
    return (row * LANES + lane) * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def find_seq(cu_seqlens, num_seqs, token):
    """The last sequence that starts at or before the token, -1 if none does; cu_seqlens ascends.

    Every round probes FAN_OUT starts at once, so that few dependent loads stand before a row.
    """
    found = tl.full([], -1, tl.int64)
    count = num_seqs + 1
    while count > 0:
        step = (count + FAN_OUT - 1) // FAN_OUT
        probe = found + 1 + tl.arange(0, FAN_OUT) * step
        start = tl.load(cu_seqlens + probe, mask=probe <= found + count, other=token + 1)
        hits = tl.sum((start <= token).to(tl.int32))
        last = found + count
        found += tl.where(hits > 0, 1 + (hits - 1) * step, 0)
        count = tl.where(hits > 0, tl.minimum(step - 1, last - found), 0)
    return found


@triton.jit
def seq_bounds(cu_seqlens, seq, seq_len, num_tokens):
    """First token of a sequence and the one past its last."""
    if cu_seqlens is None:
        return seq * seq_len, (seq + 1) * seq_len
    else:
        start = tl.maximum(tl.load(cu_seqlens + seq), 0)
        end = tl.minimum(tl.load(cu_seqlens + seq + 1), num_tokens)
        return start, tl.maximum(end, start)


@triton.jit
def find_token(cu_seqlens, token, num_seqs, seq_len, num_tokens):
    """(sequence, its first token, one past its last); sequence -1 and no tokens if none owns it."""
    if cu_seqlens is None:
        seq = token // seq_len
        return seq, seq * seq_len, (seq + 1) * seq_len
    else:
        seq = find_seq(cu_seqlens, num_seqs, token)
        nearest = tl.maximum(tl.minimum(seq, num_seqs - 1), 0)
        start, end = seq_bounds(cu_seqlens, nearest, seq_len, num_tokens)
        inside = (seq >= 0) & (start <= token) & (token < end)
        return tl.where(inside, seq, -1), start, end


@triton.jit
def row_offset(cu_seqlens, seq, start, token, seq_stride, row_stride):
    """Where the row of a token lies in logits, labels or gradient, in elements.

    Packed rows need no sequence, so that a label can be read before its sequence is looked for.
    """
    if cu_seqlens is None:
        return seq * seq_stride + (token - start) * row_stride
    else:
        return token * row_stride


@triton.jit
def local_column(label, vocab_start, begin, end):
    """The label's column if it is one of begin .. end of these logits, else -1."""
    column = label - vocab_start
    return tl.where((column >= begin) & (column < end), column, -1).to(tl.int32)


@triton.jit
def padded_seq(cu_seqlens, token, seq_len):
    """(sequence, its first token) for row_offset."""
    if cu_seqlens is None:
        seq = token // seq_len
        return seq, seq * seq_len
    else:
        return token, token


@triton.jit
def transform(x, inner, TRANSFORM: tl.constexpr):
    """(u, du/dx without a constant factor), where z = unit * u(x) are the logits seen."""
    x = x.to(tl.float32)
    if TRANSFORM == "softcap":
        return tanh(x * inner)
    else:
        return (-x if TRANSFORM == "negate" else x), 1.0
