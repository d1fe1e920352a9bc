"""Which tokens of a batch are scored, and sums over its sequences, without waiting for a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


class SequenceLayout:
    """Labels ``[S, T]``, or ``[N]`` with ``cu_seqlens [S + 1]``; tokens numbered like labels.

    ``scored_labels`` [N] hold ``ignore_index`` wherever no row of logits scores the token, and
    ``scored`` [N] says where one does.
    """

    def __init__(
        self, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, shift: bool
    ) -> None:
        self.labels = labels
        self.cu_seqlens = cu_seqlens
        self.ignore_index = ignore_index
        self.shift = shift
        self.scored_labels = reference.scored_labels(
            labels, ignore_index=ignore_index, shift=shift, cu_seqlens=cu_seqlens
        ).flatten()
        self.scored = self.scored_labels != ignore_index
        # made when first asked for; functools.cached_property takes a lock, which dynamo cannot
        self._lengths: Tensor | None = None
        self._sequence_of_token: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Scored tokens of every sequence, [S] int64."""
        if self._lengths is None:
            if self.cu_seqlens is None:
                self._lengths = self.scored.view(self.labels.shape).sum(-1)
            else:
                total = F.pad(self.scored.cumsum(0), (1, 0))
                self._lengths = total[self.cu_seqlens[1:]] - total[self.cu_seqlens[:-1]]
        return self._lengths

    @property
    def sequence_of_token(self) -> Tensor:
        """[N] of a packed batch; rows beyond the last sequence, never scored, count to the last."""
        if self._sequence_of_token is None:
            position = torch.arange(self.labels.shape[0], device=self.labels.device)
            sequence = torch.searchsorted(self.cu_seqlens[1:], position, right=True)
            self._sequence_of_token = sequence.clamp(max=max(self.cu_seqlens.shape[0] - 2, 0))
        return self._sequence_of_token

    def sums(self, values: Tensor) -> Tensor:
        """[N] to [S], in a fixed order; differentiable."""
        if self.cu_seqlens is None:
            return values.view(self.labels.shape).sum(-1)
        # its packed sum runs in sequence: float64 keeps the digits that a float32 sum would lose
        sums = torch.segment_reduce(
            values.double(), "sum", offsets=self.cu_seqlens, unsafe=True, initial=0
        )
        return sums.to(values.dtype)

    def spread(self, per_sequence: Tensor) -> Tensor:
        """[S] to [N]: every token gets the value of its sequence."""
        if self.cu_seqlens is None:
            return per_sequence.unsqueeze(-1).expand(self.labels.shape).reshape(-1)
        return per_sequence[self.sequence_of_token]

    def token_weights(self, ld_alpha: float) -> Tensor:
        """LD-DPO (arXiv:2409.06411): 1 up to ``min(n_w, n_l)`` scored tokens, ld_alpha beyond."""
        shared = self.spread(torch.minimum(*self.lengths.chunk(2)).repeat(2))
        if self.cu_seqlens is None:
            nth = self.scored.view(self.labels.shape).cumsum(-1).flatten()
        else:
            total = F.pad(self.scored.cumsum(0), (1, 0))
            nth = total[1:] - total[self.cu_seqlens[:-1]][self.sequence_of_token]
        return torch.where(nth > shared, ld_alpha, 1.0)

    def sequence_logps(self, logps: Tensor, average: bool, ld_alpha: float | None = None) -> Tensor:
        """[N] token log-probs to [S]: their (weighted) sums, or means over the scored tokens."""
        if ld_alpha is not None:
            logps = logps * self.token_weights(ld_alpha)
        sums = self.sums(logps)
        return sums / self.lengths.clamp(min=1) if average else sums

    def wpo_weights(self, aligned: Tensor) -> Tensor:
        """[P] weights of WPO (arXiv:2406.11827, eq. 2) from ``logps - log_sum_sq_probs``, [N]."""
        return reference.wpo_weights(self.sums(aligned), self.lengths)
