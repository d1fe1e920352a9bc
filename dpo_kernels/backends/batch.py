"""What ops.py hands to a backend, the batch as stored and the tensors to fill, and its checks.

A backend is a module with

    unavailable() -> why it cannot be used on this machine, or None
    refuses(device, dtype) -> why it cannot serve such logits, or None
    empty_gradient(batch) -> (memory shaped like the logits, whether it holds zeros)
    forward(batch, pair, out) -> token number of a label that is out of range, or -1
    backward(batch, tokens, grad_output, grad_logits, zero_unscored) -> the same
    CHECKS_LABELS: whether forward and backward look at the labels before they write anything
    CASTS_GRADIENT: whether backward may be given a gradient of 16 bits for float32 logits

forward and backward are called by ops.run_forward and ops.run_backward, after check_forward and
check_backward have looked at every tensor whose pointer a kernel follows. The public functions
check what a caller passes; these checks are for whoever calls an op directly, and for faults of our
own. They look at shapes, dtypes, devices and strides, never at values, so they wait for no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import accumulation_dtype

_HALF = (torch.bfloat16, torch.float16)


@dataclass(slots=True)
class TokenBatch:
    """Logits, labels and layout of one call; see csrc/launchers.h for the vocabulary.

    ``logits`` is ``[S, T, V]`` with ``labels`` ``[S, T]`` (padded), or ``[N, V]`` with ``[N]`` and
    ``cu_seqlens`` ``[S + 1]`` (packed). labels and cu_seqlens are int64 on the logits' device; the
    logits have unit stride along the vocabulary, any other strides. The kernels work on
    ``z = softcap * tanh(scale * x / softcap) / temperature`` (``scale * x / temperature`` when
    softcap is 0).

    With ``vocab_total`` the logits are a shard, columns ``vocab_start`` to ``vocab_start + V`` of a
    vocabulary of that size, and a label may lie on another shard.
    """

    logits: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    ignore_index: int
    shift: bool
    scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0
    vocab_start: int = 0
    vocab_total: int = 0

    @property
    def num_seqs(self) -> int:
        if self.cu_seqlens is None:
            return self.logits.shape[0]
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        return self.labels.numel()

    @property
    def labels_below(self) -> int:
        return self.vocab_total or self.logits.shape[-1]

    @property
    def acc_dtype(self) -> torch.dtype:
        return accumulation_dtype(self.logits.dtype)


@dataclass(slots=True)
class PairLoss:
    """The sigmoid loss with smoothing, made inside the forward; ``reference_logps`` is ``[2P]``."""

    reference_logps: Tensor | None  # None: all zero
    beta: float
    label_smoothing: float
    weight: float  # of one pair in the scalar loss: 1 / P for the mean, 1 for the sum


@dataclass(slots=True)
class ForwardOutputs:
    """Contiguous tensors that a backend's ``forward`` fills, every element of them.

    All are of the accumulation dtype but ``is_top1`` (bool) and ``counts`` (int64). None: not
    wanted. Tokens are numbered like labels, and hold 0 where nothing is scored.
    """

    tokens: Tensor  # [3, N]: logps, row_max, log_sum; of a shard, csrc/launchers.h says what
    stats: Tensor | None  # [3, N]: entropy, mean_logits, log_sum_sq_probs
    is_top1: Tensor | None  # [N]
    seqs: Tensor | None  # [2, S]: logps, scale; [3, S] with a pair loss: and rewards
    counts: Tensor | None  # [S]
    losses: Tensor | None  # [P]
    loss: Tensor | None  # []
    average: bool


@dataclass(slots=True)
class GradOutput:
    """The gradient that reaches the per-token log-probs: ``scale[s] * grad[stride * index]``.

    ``index`` says what ``grad`` is indexed by: "token", "sequence" or "pair" (s mod P).
    ``grad`` is 1-D contiguous of the accumulation dtype, or one element with stride 0.
    """

    grad: Tensor
    stride: int
    index: str
    scale: Tensor | None  # [S]


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
