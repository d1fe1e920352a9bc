"""What must hold of every tensor before a kernel follows its pointer.

The public functions check what a caller passes; these checks are for whoever calls an op directly,
and for faults of our own. They look at shapes, dtypes, devices and strides, never
at values, so they cost no wait for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import accumulation_dtype
from .batch import ForwardOutputs, GradOutput, PairLoss, TokenBatch

_HALF = (torch.bfloat16, torch.float16)


def _describe(tensor: Tensor) -> str:
    text = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
    return text if tensor.is_contiguous() else f"{text} with strides {list(tensor.stride())}"


def _refuse(name: str, tensor: Tensor, expected: str) -> None:
    raise RuntimeError(f"dpo_kernels: {name}: expected {expected}, got {_describe(tensor)}")


def _check(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Contiguous, of this very shape, dtype and device; None passes."""
    if tensor is not None and not (
        tensor.dtype is dtype
        and tensor.shape == shape
        and tensor.is_contiguous()
        and tensor.device == device
    ):
        _refuse(name, tensor, f"contiguous {dtype} {list(shape)} on {device}")


def check_batch(batch: TokenBatch) -> tuple[int, int, torch.dtype, torch.device]:
    """(tokens, sequences, accumulation dtype, device) of a batch whose tensors fit together."""
    logits, labels, cu_seqlens = batch.logits, batch.labels, batch.cu_seqlens
    device, shape = logits.device, logits.shape
    dims = 3 if cu_seqlens is None else 2
    if len(shape) != dims or (logits.stride()[-1] != 1 and shape[-1] > 1):
        _refuse("logits", logits, f"{dims} dimensions, the last of stride 1")
    rows = shape[:-1]
    if labels.shape != rows or labels.dtype is not torch.int64 or labels.device != device:
        _refuse("labels", labels, f"torch.int64 {list(rows)} on {device}")
    seqs = shape[0]
    if cu_seqlens is not None:
        seqs = cu_seqlens.numel() - 1
        _check("cu_seqlens", cu_seqlens, (max(seqs, 0) + 1,), torch.int64, device)
    if batch.vocab_total or batch.vocab_start:
        last = batch.vocab_total - shape[-1]
        if not 0 <= batch.vocab_start <= last:
            expected = f"columns of a vocabulary of {batch.vocab_total} from {batch.vocab_start} on"
            _refuse("logits", logits, expected)
    return labels.numel(), seqs, accumulation_dtype(logits.dtype), device


def check_forward(batch: TokenBatch, pair: PairLoss | None, out: ForwardOutputs) -> None:
    """Raises RuntimeError with the name of the first tensor that does not fit."""
    n, s, acc, device = check_batch(batch)
    _check("tokens", out.tokens, (3, n), acc, device)
    if out.stats is not None:
        _check("stats", out.stats, (3, n), acc, device)
        _check("is_top1", out.is_top1, (n,), torch.bool, device)
    if batch.vocab_total and (pair is not None or out.seqs is not None):
        _refuse("logits", batch.logits, "a whole vocabulary for sums over sequences")
    if out.seqs is not None:
        _check("seqs", out.seqs, (2 if pair is None else 3, s), acc, device)
        _check("counts", out.counts, (s,), torch.int64, device)
    if pair is not None:
        if s % 2:
            _refuse("labels", batch.labels, "an even number of sequences")
        _check("reference_logps", pair.reference_logps, (s,), acc, device)
        _check("losses", out.losses, (s // 2,), acc, device)
        _check("loss", out.loss, (), acc, device)


def check_backward(
    batch: TokenBatch,
    tokens: Tensor,
    grad_output: GradOutput,
    grad_logits: Tensor,
    casts: bool,
) -> None:
    """The same; ``casts``: the gradient of float32 logits may have 16 bits."""
    n, s, acc, device = check_batch(batch)
    logits = batch.logits
    _check("tokens", tokens, (3, n), acc, device)
    _check("seq_scale", grad_output.scale, (s,), acc, device)
    grad, index = grad_output.grad, grad_output.index
    if index == "pair" and s % 2:
        _refuse("labels", batch.labels, "an even number of sequences")
    if grad_output.stride:
        count = n if index == "token" else s if index == "sequence" else s // 2
        _check("grad", grad, (count,), acc, device)
    elif grad.dtype is not acc or grad.device != device or not (grad.numel() or n == 0):
        _refuse("grad", grad, f"{acc} and one element on {device}")
    shape, dtype = logits.shape, grad_logits.dtype
    if (
        grad_logits.shape != shape
        or not (
            dtype is logits.dtype or (casts and logits.dtype is torch.float32 and dtype in _HALF)
        )
        or grad_logits.device != device
        or (grad_logits.stride()[-1] != 1 and shape[-1] > 1)
    ):
        expected = f"{logits.dtype} {list(shape)} on {device}"
        _refuse("grad_logits", grad_logits, f"{expected}, its last stride 1")
