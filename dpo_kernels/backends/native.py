"""The compiled module, and how tensors become the structs of csrc/launchers.h.

The tensors must have passed boundary.py: from here on they are addresses.
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


def _strides(tensor: Tensor, trailing: int) -> tuple[int, int]:
    """(sequence, row) strides before ``trailing`` dimensions; packed rows have no sequences."""
    strides = tensor.stride()
    return (strides[0], strides[1]) if len(strides) == 2 + trailing else (0, strides[0])


# a keyword of pybind11 costs 80 ns, a position of a tuple 20: what belongs together is one tuple


def native_batch(batch: TokenBatch) -> _C.TokenBatch:
    logits, labels = batch.logits, batch.labels
    return MODULE.TokenBatch(
        logits=(logits.data_ptr(), *_strides(logits, 1)),
        dtype=_DTYPE_CODES[logits.dtype],
        labels=(labels.data_ptr(), *_strides(labels, 0)),
        cu_seqlens=_pointer(batch.cu_seqlens),
        shape=(batch.num_seqs, labels.shape[-1], logits.shape[-1]),
        scoring=(batch.ignore_index, batch.shift),
        transform=(batch.scale, batch.softcap, 1.0 / batch.temperature),
    )


def native_pair_loss(pair: PairLoss | None) -> _C.PairLoss | None:
    if pair is None:
        return None
    return MODULE.PairLoss(
        _pointer(pair.reference_logps),
        beta=pair.beta,
        label_smoothing=pair.label_smoothing,
        weight=pair.weight,
    )


def native_outputs(native: _C.TokenBatch, out: ForwardOutputs) -> _C.ForwardOutputs:
    return MODULE.ForwardOutputs(
        native,
        tokens=out.tokens.data_ptr(),
        stats=(_pointer(out.stats), _pointer(out.is_top1)),
        seqs=(_pointer(out.seqs), _pointer(out.counts)),
        losses=(_pointer(out.losses), _pointer(out.loss)),
        average=out.average,
    )


def native_backward(
    native: _C.TokenBatch, tokens: Tensor, grad_output: GradOutput, grad_logits: Tensor, zero: bool
) -> _C.Backward:
    return MODULE.Backward(
        native,
        tokens=tokens.data_ptr(),
        seq_scale=_pointer(grad_output.scale),
        grad=(
            grad_output.grad.data_ptr(),
            _GRAD_INDEX_CODES[grad_output.index],
            grad_output.stride,
        ),
        grad_logits=(grad_logits.data_ptr(), *_strides(grad_logits, 1)),
        grad_dtype=_DTYPE_CODES[grad_logits.dtype],
        zero_unscored=zero,
    )
