"""Sequences whose tokens are split over ranks: sums and lengths of the whole ones.

Each rank has a slice of every sequence. What it knows of a sequence, the sum of its log-probs and
their number, is gathered once and added up, in the order of the ranks. The loss is then the same on
every rank, and a rank's log-probs get the gradient that they have in it without another collective.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sequences import SequenceLayout
from .groups import gather


class SplitLayout(SequenceLayout):
    """A rank's slices; sums over sequences and their lengths are of the whole sequences."""

    def __init__(self, own: SequenceLayout, group: Any) -> None:
        super().__init__(own.labels, own.cu_seqlens, own.ignore_index, own.shift)
        self.group = group
        self._counts: Tensor | None = None
        self._whole_lengths: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Of whole sequences: a collective, unless sums have been made already."""
        if self._whole_lengths is None:
            self._whole_lengths = self._lengths_by_rank().sum(0)
        return self._whole_lengths

    def _lengths_by_rank(self) -> Tensor:
        if self._counts is None:
            self._counts = gather("sequence_group", self.group, "lengths", super().lengths)
        return self._counts

    def nth_scored(self) -> Tensor:
        """Right where a sequence's slices follow one another in the order of the ranks."""
        before = self._lengths_by_rank()[: self.group.rank()].sum(0)
        return super().nth_scored() + self.spread(before)

    def whole_sums(self, *wanted: tuple[Tensor, bool]) -> tuple[Tensor, ...]:
        first, *others = (self.wide_sums(x) for x, _ in wanted)
        counted = self._whole_lengths is not None
        if not counted:
            others.append(super().lengths.to(first.dtype))
        rest = torch.stack(others) if others else first.new_empty((0, *first.shape))
        first, rest = WholeSums.apply(first, rest.detach(), self.group)
        if not counted:
            *_, lengths = rest
            self._whole_lengths = lengths.long()
        return tuple(
            (sums / self.lengths.clamp(min=1) if mean else sums).to(x.dtype)
            for sums, (x, mean) in zip((first, *rest), wanted, strict=False)
        )


class WholeSums(torch.autograd.Function):
    """(sums [S], the others [k, S]) over the ranks; only the first have a gradient.

    Every rank has the whole loss, so the gradient of a rank's part is that of the sum.
    """

    @staticmethod
    def forward(ctx: Any, sums: Tensor, others: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        local = torch.cat((sums.unsqueeze(0), others))
        # in float64, which leaves one rounding
        total = gather("sequence_group", group, "sums over sequences", local).sum(0)
        first, rest = total[0].clone(), total[1:].clone()
        ctx.mark_non_differentiable(rest)
        return first, rest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, unused: None) -> tuple[Tensor, None, None]:
        return grad, None, None
