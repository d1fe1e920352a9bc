"""Checked logits with their labels: what the functions from logits work on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd import CallOptions, SequenceLogps, TokenLogps
from .checks import (
    check_cu_seqlens,
    check_flag,
    check_inplace,
    check_labels,
    check_row_options,
    check_rows,
)
from .compat import is_dtensor
from .dispatch import check_name
from .parallel.agreement import check_same_batch
from .parallel.groups import ALONE, check_groups, columns_of
from .parallel.sequence import SplitLayout
from .sequences import SequenceLayout
from .types import LossOptions


class Logits:
    """The TokenSource of a call from logits."""

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        options: CallOptions,
        name: str = "logits",
    ) -> None:
        if is_dtensor(logits) and not torch.compiler.is_compiling():
            logits, groups = columns_of(name, logits, options.groups, options.inplace_backward)
            options = options._replace(groups=groups)
        check_rows(name, logits, "vocabulary")
        labels = check_labels(labels, logits, name)
        cu_seqlens = check_cu_seqlens(cu_seqlens, logits, name)
        if logits.stride(-1) != 1 and logits.shape[-1] != 1:
            logits = logits.contiguous()
        if options.inplace_backward:
            check_inplace(logits)
        self.logits = logits
        self.options = options
        rows = options.rows
        self.layout = SequenceLayout(labels, cu_seqlens, rows.ignore_index, rows.shift)
        if options.groups is not ALONE:
            self._join_ranks(name)

    def _join_ranks(self, name: str) -> None:
        groups, logits = self.options.groups, self.logits
        check_same_batch(
            groups,
            self.options.rows,
            self.layout,
            vocab={name: (logits.dtype, *logits.shape[:-1])},
            sequence={name: (logits.dtype, f"{logits.shape[-1]} columns")},
        )
        if groups.sequence is not None:
            self.layout = SplitLayout(self.layout, groups.sequence)

    def tokens(self, stats: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(logps [N], stats [3, N], is_top1 [N]), whatever the number of dimensions."""
        logits, labels, cu_seqlens = self.logits, self.layout.labels, self.layout.cu_seqlens
        if cu_seqlens is None and logits.dim() != 3:
            logits = logits.unsqueeze(0) if logits.dim() == 2 else logits.flatten(0, -3)
            labels = labels.unsqueeze(0) if labels.dim() == 1 else labels.flatten(0, -2)
        return TokenLogps.apply(logits, labels, cu_seqlens, self.options, stats)

    def sequence_logps(self, options: LossOptions) -> Tensor:
        layout, average = self.layout, options.average_log_prob
        if options.ld_alpha is not None:
            return layout.sequence_logps(self.tokens()[0], average, options.ld_alpha)
        return self.sums(average)

    def sums(self, average: bool) -> Tensor:
        """[S]: sums, or means, over every sequence; on one device the kernels' own."""
        layout = self.layout
        if any(self.options.groups):
            return layout.sequence_logps(self.tokens()[0], average)
        logps, lengths = SequenceLogps.apply(
            self.logits, layout.labels, layout.cu_seqlens, self.options, average
        )
        layout.set_lengths(lengths)
        return logps


def call_options(
    ignore_index: int,
    shift: bool,
    temperature: float,
    backend: str | None,
    vocab_group: Any,
    sequence_group: Any,
    inplace: bool = False,
) -> CallOptions:
    rows = check_row_options(ignore_index, shift, temperature)
    groups = check_groups(vocab_group, sequence_group, rows.shift)
    return CallOptions(rows, check_name(backend), check_flag("inplace_backward", inplace), groups)
