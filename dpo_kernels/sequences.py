"""Which tokens of a batch are scored, and sums over its sequences, without waiting for a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class SequenceLayout:
    """Labels ``[S, T]``, or ``[N]`` with ``cu_seqlens [S + 1]``; tokens are numbered like labels.

    Everything is O(N), and made when first asked for.
    """

    def __init__(
        self, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, shift: bool
    ) -> None:
        self.labels = labels
        self.cu_seqlens = cu_seqlens
        self.ignore_index = ignore_index
        self.shift = shift
        # functools.cached_property takes a lock, which dynamo cannot
        self._bounds: Tensor | None = None
        self._scored_labels: Tensor | None = None
        self._scored: Tensor | None = None
        self._lengths: Tensor | None = None
        self._sequence_of_token: Tensor | None = None

    @property
    def num_seqs(self) -> int:
        if self.cu_seqlens is None:
            return self.labels.shape[0]
        return self.cu_seqlens.shape[0] - 1

    @property
    def bounds(self) -> Tensor:
        """``cu_seqlens`` [S + 1], rising and within [0, N] whatever came.

        A GPU is not waited for to check them, and an index out of bounds would end its context.
        """
        assert self.cu_seqlens is not None
        if self._bounds is None:
            self._bounds = self.cu_seqlens
            if self.cu_seqlens.device.type != "cpu":
                self._bounds = self.cu_seqlens.clamp(0, self.labels.shape[0]).cummax(0).values
        return self._bounds

    @property
    def scored_labels(self) -> Tensor:
        """[N] labels with ``ignore_index`` wherever no row of logits scores the token.

        With shift that is the first token of every sequence; packed, also what lies outside them.
        """
        if self._scored_labels is None:
            labels = self.labels.flatten()
            if self.shift or self.cu_seqlens is not None:
                labels = labels.where(self.scored, self.ignore_index)
            self._scored_labels = labels
        return self._scored_labels

    @property
    def scored(self) -> Tensor:
        """[N] bool."""
        if self._scored is None:
            scored = self.labels != self.ignore_index
            if self.cu_seqlens is not None:
                position = torch.arange(self.labels.shape[0], device=self.labels.device)
                first = self.bounds[self.sequence_of_token] + int(self.shift)
                scored = scored & (position >= first) & (position < self.bounds[-1])
            elif self.shift:
                scored[:, :1] = False
            self._scored = scored.flatten()
        return self._scored

    @property
    def lengths(self) -> Tensor:
        """The numbers of scored tokens, [S] int64."""
        if self._lengths is None:
            if self.cu_seqlens is None:
                self._lengths = self.scored.view(self.labels.shape).sum(-1)
            else:
                self._lengths = self._scored_before()[self.bounds].diff()
        return self._lengths

    def set_lengths(self, lengths: Tensor) -> None:
        """For a kernel that has counted them."""
        self._lengths = lengths

    @property
    def sequence_of_token(self) -> Tensor:
        """[N] of a packed batch; the tokens behind the last sequence are given to it."""
        if self._sequence_of_token is None:
            position = torch.arange(self.labels.shape[0], device=self.labels.device)
            sequence = torch.searchsorted(self.bounds[1:], position, right=True)
            self._sequence_of_token = sequence.clamp(max=max(self.num_seqs - 1, 0))
        return self._sequence_of_token

    def _scored_before(self) -> Tensor:
        """[N + 1]: how many tokens of a packed batch are scored before each."""
        return F.pad(self.scored.cumsum(0), (1, 0))

    def sums(self, values: Tensor) -> Tensor:
        """[N] to [S], differentiable; rounded once, as the kernels' sums are, so that a sequence
        has the same bits whoever adds it up."""
        return self.wide_sums(values).to(values.dtype)

    def means(self, values: Tensor) -> Tensor:
        """Sums over the numbers of scored tokens; finite where values are, even if a sum is not."""
        return (self.wide_sums(values) / self.lengths.clamp(min=1)).to(values.dtype)

    def wide_sums(self, values: Tensor) -> Tensor:
        """In float64, in a fixed order."""
        # Apple's GPUs have none
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        if self.cu_seqlens is None:
            return values.view(self.labels.shape).sum(-1, dtype=wide)
        return torch.segment_reduce(
            values.to(wide), "sum", offsets=self.bounds, unsafe=True, initial=0
        )

    def spread(self, per_sequence: Tensor) -> Tensor:
        """[S] to [N]: every token gets the value of its sequence."""
        if self.cu_seqlens is None:
            return per_sequence.unsqueeze(-1).expand(self.labels.shape).reshape(-1)
        if self.num_seqs == 0:
            return per_sequence.new_zeros(self.labels.shape)
        return per_sequence[self.sequence_of_token]

    def of_rows(self, values: Tensor) -> Tensor:
        """[N] by token to [N] by row of logits: with shift, row n scores token n + 1.

        The last row gets the value of token 0, which no row scores then.
        """
        return values.roll(-1) if self.shift else values

    def token_weights(self, ld_alpha: float, dtype: torch.dtype) -> Tensor:
        """LD-DPO (arXiv:2409.06411), [N]: 1 up to ``min(n_w, n_l)`` scored tokens, then ld_alpha.

        What unscored tokens get does not matter.
        """
        shared = self.spread(torch.minimum(*self.lengths.chunk(2)).repeat(2))
        nth = self.nth_scored()
        weights = torch.ones(nth.shape, dtype=dtype, device=nth.device)
        return weights.masked_fill(nth > shared, ld_alpha)

    def nth_scored(self) -> Tensor:
        """[N]: the how manieth scored token of its sequence each one is, counted from 1."""
        if self.cu_seqlens is None:
            return self.scored.view(self.labels.shape).cumsum(-1).flatten()
        before = self._scored_before()
        return before[1:] - before[self.bounds[self.sequence_of_token]]

    def whole_sums(self, *wanted: tuple[Tensor, bool]) -> tuple[Tensor, ...]:
        """[S] each of ([N], whether the mean); only the first are sure to have a gradient."""
        return tuple(self.means(x) if mean else self.sums(x) for x, mean in wanted)

    def sequence_logps(self, logps: Tensor, average: bool, ld_alpha: float | None = None) -> Tensor:
        """[N] token log-probs to [S]: their (weighted) sums, or means over the scored tokens."""
        return self.logps_and_weights(logps, None, average, ld_alpha)[0]

    def logps_and_weights(
        self, logps: Tensor, aligned: Tensor | None, average: bool, ld_alpha: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """sequence_logps, and wpo_weights of ``aligned`` where there are any."""
        if ld_alpha is not None:
            weights = self.token_weights(ld_alpha, logps.dtype)
            logps = logps * weights
            if ld_alpha == 0:
                # 0 * -inf is not 0
                logps = logps.masked_fill(weights == 0, 0.0)
        wanted = [(logps, average)] if aligned is None else [(logps, average), (aligned, True)]
        sums, *means = self.whole_sums(*wanted)
        return sums, self._wpo_weights(means[0]) if means else None

    def wpo_weights(self, aligned: Tensor) -> Tensor:
        """[P] weights of WPO (arXiv:2406.11827, eq. 2) from ``logps - log_sum_sq_probs``, [N].

        ``w_w w_l`` a pair, ``w = exp(mean(logp - log sum p^2))``.
        """
        return self._wpo_weights(*self.whole_sums((aligned, True)))

    def _wpo_weights(self, means: Tensor) -> Tensor:
        chosen, rejected = means.chunk(2)
        return (chosen + rejected).exp()
