"""Tensors to kernel arguments, options to constexpr flags, and one launch a pass."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from ..batch import ForwardOutputs, GradOutput, PairLoss, TokenBatch
from .backward_kernel import CHUNK, backward_kernel
from .common import LANES
from .forward_kernel import forward_kernel
from .row_reduction import SEGMENT

_LANES, _SEGMENT, _CHUNK = LANES.value, SEGMENT.value, CHUNK.value
# of one tile: two 16-byte loads a thread, few enough registers for four programs a multiprocessor
_BYTES_PER_LANE = 32
# the contraction of a * b + c may differ between two compilations of one formula, and with it bits
_OPTIONS = {"num_warps": _LANES // (64 if torch.version.hip else 32), "enable_fp_fusion": False}


@functools.lru_cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _device_guard(device: torch.device):
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _vector(vocab: int, *tensors: Tensor) -> int:
    """The widest access in elements, up to 16 bytes, to which every row of each is aligned."""
    return min(_aligned_elements(vocab, tensor) for tensor in tensors)


def _aligned_elements(vocab: int, tensor: Tensor) -> int:
    size = tensor.element_size()
    combined = vocab * size | tensor.data_ptr() | 16
    for stride in tensor.stride()[:-1]:
        combined |= stride * size
    return (combined & -combined) // size


def _tile(vocab: int, logits: Tensor, *others: Tensor) -> dict[str, int]:
    per_lane = 1 << (-(-vocab // _LANES) - 1).bit_length()
    elements = min(_BYTES_PER_LANE // logits.element_size(), per_lane)
    return {"ELEMENTS": elements, "VECTOR": min(_vector(vocab, logits, *others), elements)}


def _strides(tensor: Tensor, rows: int) -> tuple[int, int]:
    """(sequence, row) strides of a tensor whose dimension ``rows`` counts tokens."""
    strides = tensor.stride()
    return (strides[rows - 1] if rows else 0), strides[rows]


def _transform(batch: TokenBatch) -> tuple[str, float, float, float]:
    """(TRANSFORM, unit, inner, dz_dx): z = unit * u(x), unit >= 0, dz/dx = dz_dx * u'(x) / inner.

    u is x, -x or tanh(inner * x); dz_dx stands for unit * inner, with the sign of x or -x.
    """
    factor = batch.scale / batch.temperature
    if batch.softcap:
        return "softcap", batch.softcap / batch.temperature, batch.scale / batch.softcap, factor
    return ("negate" if factor < 0 else "none"), abs(factor), 0.0, factor


def _cu_seqlens(batch: TokenBatch) -> Tensor | None:
    """Ascending whatever came: every token then has one sequence, and every counter is met."""
    return None if batch.cu_seqlens is None else batch.cu_seqlens.cummax(0).values


def _splits(batch: TokenBatch, segments: int) -> bool:
    """Whether whole rows are too few programs to keep the device busy to the end."""
    return segments > 1 and batch.num_tokens < 16 * _processors(batch.logits.device)


def launch_forward(batch: TokenBatch, pair: PairLoss | None, out: ForwardOutputs) -> None:
    logits, labels = batch.logits, batch.labels
    num_tokens, num_seqs, vocab = batch.num_tokens, batch.num_seqs, logits.shape[-1]
    rows = labels.dim() - 1
    segments = -(-vocab // _SEGMENT)
    split = _splits(batch, segments)
    programs = num_tokens * (segments if split else 1) + (num_seqs if out.seqs is not None else 0)
    if programs == 0 or (pair is not None and num_seqs < 2):
        if out.loss is not None:
            out.loss.zero_()
        return
    transform, unit, inner, _ = _transform(batch)
    partials = counters = None
    with _device_guard(logits.device):
        if split:
            fields = 2 if out.stats is None else 6
            partials = out.tokens.new_empty(fields * num_tokens * segments)
        if split or out.seqs is not None:
            count = 2 * num_seqs + 1 + (num_tokens if split else 0)
            # for this call alone: calls on several streams, captured graphs and their replays share
            # nothing, and a memory pool gets back all that it gave
            counters = torch.zeros(count, dtype=torch.int32, device=logits.device)
        forward_kernel[(programs,)](
            logits, labels, _cu_seqlens(batch),
            out.tokens, out.stats, out.is_top1, out.seqs, out.counts,
            pair.reference_logps if pair else None, out.losses, out.loss, partials, counters,
            *_strides(logits, rows), *_strides(labels, rows),
            num_seqs, labels.shape[-1], num_tokens,
            vocab, batch.vocab_start, batch.labels_below,
            batch.ignore_index, int(batch.shift), unit, inner,
            pair.beta if pair else 0.0,
            pair.label_smoothing if pair else 0.0,
            pair.weight if pair else 0.0,
            TRANSFORM=transform, AVERAGE=out.average, SPLIT=split, SHARD=batch.vocab_total > 0,
            SEGMENTS=1 << (segments - 1).bit_length(),
            **_tile(vocab, logits), **_OPTIONS,
        )  # fmt: skip


def launch_backward(
    batch: TokenBatch,
    tokens: Tensor,
    grad_output: GradOutput,
    grad_logits: Tensor,
    zero_unscored: bool,
) -> None:
    logits, labels = batch.logits, batch.labels
    num_tokens, vocab = batch.num_tokens, logits.shape[-1]
    rows = labels.dim() - 1
    programs = num_tokens * -(-vocab // _CHUNK)
    if programs == 0:
        return
    transform, unit, inner, dz_dx = _transform(batch)
    with _device_guard(logits.device):
        backward_kernel[(programs,)](
            logits, labels, _cu_seqlens(batch), tokens, grad_output.scale, grad_output.grad,
            grad_logits,
            *_strides(logits, rows), *_strides(labels, rows),
            batch.num_seqs, labels.shape[-1], num_tokens, vocab, batch.vocab_start,
            batch.ignore_index, int(batch.shift), unit, inner, dz_dx,
            grad_output.stride, *_strides(grad_logits, rows), int(zero_unscored),
            TRANSFORM=transform, GRAD_INDEX=grad_output.index,
            **_tile(vocab, logits, grad_logits), **_OPTIONS,
        )  # fmt: skip
