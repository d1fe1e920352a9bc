"""What ops.py hands to a backend: the batch as stored, and the tensors to fill.

A backend is a module with

    unavailable() -> why it cannot be used on this machine, or None
    refuses(device, dtype) -> why it cannot serve such logits, or None
    empty_gradient(batch) -> (memory shaped like the logits, whether it holds zeros)
    forward(batch, pair, out) -> token number of a label that is out of range, or -1
    backward(batch, tokens, grad_output, grad_logits, zero_unscored) -> the same
    CHECKS_LABELS: whether forward and backward look at the labels before they write anything
    CASTS_GRADIENT: whether backward may be given a gradient of 16 bits for float32 logits

forward and backward are called by ops.run_forward and ops.run_backward, which have checked shapes,
dtypes, devices and strides (boundary.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import accumulation_dtype


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
