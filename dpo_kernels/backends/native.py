"""The compiled module, and how tensors become the structs of csrc/launchers.h.

The tensors must have passed the checks of batch.py: from here on they are addresses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..build_record import why_no_module
from .batch import ForwardOutputs, GradOutput, PairLoss, TokenBatch

_load_error: str | None = None
if TYPE_CHECKING:
    # None where load_error() gives a reason, which dispatch asks before it calls a backend
    from .. import _C
    from .. import _C as MODULE
else:
    try:
        from .. import _C as MODULE
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


def _strided(tensor: Tensor, packed: bool) -> tuple[int, int, int]:
    """(address, sequence stride, row stride); packed rows have no sequences."""
    strides = tensor.stride()
    if packed:
        return tensor.data_ptr(), 0, strides[0]
    return tensor.data_ptr(), strides[0], strides[1]


# These run once a call. A keyword of pybind11 costs 80 ns, a position of a tuple 20: what belongs
# together is one tuple, and the few arguments are passed by position.


def native_batch(batch: TokenBatch) -> _C.TokenBatch:
    logits, labels, cu_seqlens = batch.logits, batch.labels, batch.cu_seqlens
    sizes = logits.shape
    packed = cu_seqlens is not None
    num_seqs, seq_len, vocab = (cu_seqlens.numel() - 1, *sizes) if packed else sizes
    scoring = (batch.ignore_index, batch.shift)
    transform = (batch.scale, batch.softcap, 1.0 / batch.temperature)
    return MODULE.TokenBatch(
        _strided(logits, packed),
        _DTYPE_CODES[logits.dtype],
        _strided(labels, packed),
        cu_seqlens.data_ptr() if packed else 0,
        (num_seqs, seq_len, vocab),
        scoring,
        transform,
        (batch.vocab_start, batch.vocab_total),
    )


def native_pair_loss(pair: PairLoss | None) -> _C.PairLoss | None:
    if pair is None:
        return None
    return MODULE.PairLoss(
        _pointer(pair.reference_logps), pair.beta, pair.label_smoothing, pair.weight
    )


def native_outputs(native: _C.TokenBatch, out: ForwardOutputs) -> _C.ForwardOutputs:
    return MODULE.ForwardOutputs(
        native,
        out.tokens.data_ptr(),
        (_pointer(out.stats), _pointer(out.is_top1)),
        (_pointer(out.seqs), _pointer(out.counts)),
        (_pointer(out.losses), _pointer(out.loss)),
        out.average,
    )


def native_backward(
    native: _C.TokenBatch, tokens: Tensor, grad_output: GradOutput, grad_logits: Tensor, zero: bool
) -> _C.Backward:
    index = _GRAD_INDEX_CODES[grad_output.index]
    return MODULE.Backward(
        native,
        tokens.data_ptr(),
        _pointer(grad_output.scale),
        (grad_output.grad.data_ptr(), index, grad_output.stride),
        _strided(grad_logits, grad_logits.dim() == 2),
        _DTYPE_CODES[grad_logits.dtype],
        zero,
    )
