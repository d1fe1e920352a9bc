"""The compiled module, and how tensors become the structs of csrc/launchers.h."""

from __future__ import annotations

import torch
from torch import Tensor

from ..build_record import why_no_module
from .batch import ForwardOutputs, PairLoss, TokenBatch, Upstream

try:
    from .. import _C as MODULE

    _load_error = None
except ImportError as error:
    MODULE = None
    _load_error = why_no_module(error)

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_GRAD_INDEX_CODES = {"token": 0, "sequence": 1, "pair": 2}


def load_error() -> str | None:
    """None, or why there is no compiled module."""
    return _load_error


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _strides(tensor: Tensor) -> tuple[int, int]:
    """(sequence, row) strides of logits or their gradient; packed rows have no sequence stride."""
    strides = tensor.stride()
    return (strides[0], strides[1]) if len(strides) == 3 else (0, strides[0])


def native_batch(batch: TokenBatch):
    logits, labels = batch.logits, batch.labels
    label_strides = labels.stride()
    return MODULE.TokenBatch(
        logits.data_ptr(),
        _DTYPE_CODES[logits.dtype],
        logits.shape[-1],
        *_strides(logits),
        labels.data_ptr(),
        label_strides[0] if len(label_strides) == 2 else 0,
        label_strides[-1],
        _pointer(batch.cu_seqlens),
        batch.num_seqs,
        labels.shape[-1],
        batch.ignore_index,
        batch.shift,
        batch.scale,
        batch.softcap,
        1.0 / batch.temperature,
    )


def native_pair_loss(pair: PairLoss | None):
    if pair is None:
        return None
    return MODULE.PairLoss(
        _pointer(pair.reference_logps), pair.beta, pair.label_smoothing, pair.weight
    )


def native_outputs(native, out: ForwardOutputs):
    return MODULE.ForwardOutputs(
        native,
        out.tokens.data_ptr(),
        _pointer(out.stats),
        _pointer(out.is_top1),
        _pointer(out.seqs),
        _pointer(out.counts),
        _pointer(out.losses),
        _pointer(out.loss),
        out.average,
    )


def native_backward(native, tokens: Tensor, upstream: Upstream, grad_logits: Tensor, zero: bool):
    return MODULE.Backward(
        native,
        tokens.data_ptr(),
        _pointer(upstream.scale),
        upstream.grad.data_ptr(),
        _GRAD_INDEX_CODES[upstream.index],
        upstream.stride,
        grad_logits.data_ptr(),
        *_strides(grad_logits),
        zero,
    )
