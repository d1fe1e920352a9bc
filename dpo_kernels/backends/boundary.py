"""What must hold of every tensor before a kernel follows its pointer.

The public functions check what a caller passes; these checks are for whoever calls an op or a
backend directly, and for faults of our own. They look at shapes, dtypes, devices and strides, never
at values, so they cost no wait for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import ForwardOutputs, GradOutput, PairLoss, TokenBatch


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
    if tensor is not None and (
        tensor.dtype is not dtype
        or tensor.shape != shape
        or not tensor.is_contiguous()
        or tensor.device != device
    ):
        _refuse(name, tensor, f"contiguous {dtype} {list(shape)} on {device}")


def check_batch(batch: TokenBatch) -> None:
    logits, labels, cu_seqlens = batch.logits, batch.labels, batch.cu_seqlens
    device = logits.device
    dims = 3 if cu_seqlens is None else 2
    if logits.dim() != dims or (logits.stride(-1) != 1 and logits.shape[-1] > 1):
        _refuse("logits", logits, f"{dims} dimensions, the last of stride 1")
    shape = logits.shape[:-1]
    if labels.shape != shape or labels.dtype is not torch.int64 or labels.device != device:
        _refuse("labels", labels, f"torch.int64 {list(shape)} on {device}")
    if cu_seqlens is not None:
        _check("cu_seqlens", cu_seqlens, (max(cu_seqlens.numel(), 1),), torch.int64, device)


def check_forward(batch: TokenBatch, pair: PairLoss | None, out: ForwardOutputs) -> None:
    """Raises RuntimeError with the name of the first tensor that does not fit."""
    check_batch(batch)
    acc, device = batch.acc_dtype, batch.logits.device
    n, s = batch.num_tokens, batch.num_seqs
    _check("tokens", out.tokens, (3, n), acc, device)
    if out.stats is not None:
        _check("stats", out.stats, (3, n), acc, device)
        _check("is_top1", out.is_top1, (n,), torch.bool, device)
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
    grad_dtypes: tuple[torch.dtype, ...] = (),
) -> None:
    """The same; ``grad_dtypes``: what the gradient may be beside the logits' dtype."""
    check_batch(batch)
    logits, acc, s = batch.logits, batch.acc_dtype, batch.num_seqs
    device = logits.device
    _check("tokens", tokens, (3, batch.num_tokens), acc, device)
    _check("seq_scale", grad_output.scale, (s,), acc, device)
    grad, index = grad_output.grad, grad_output.index
    if index == "pair" and s % 2:
        _refuse("labels", batch.labels, "an even number of sequences")
    count = {"token": batch.num_tokens, "sequence": s, "pair": s // 2}[index]
    if grad_output.stride:
        _check("grad", grad, (count,), acc, device)
    elif grad.dtype is not acc or grad.device != device or (count and not grad.numel()):
        _refuse("grad", grad, f"{acc} and one element on {device}")
    if (
        grad_logits.shape != logits.shape
        or (grad_logits.dtype is not logits.dtype and grad_logits.dtype not in grad_dtypes)
        or grad_logits.device != device
        or (grad_logits.stride(-1) != 1 and grad_logits.shape[-1] > 1)
    ):
        expected = f"{logits.dtype} {list(logits.shape)} on {device}"
        _refuse("grad_logits", grad_logits, f"{expected}, its last stride 1")
