"""Checked hidden states with a head and labels: what the functions from hidden states work on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import (
    check_cu_seqlens,
    check_head,
    check_labels,
    check_padded_or_packed,
    check_precision,
    check_rows,
    check_savable,
)
from ..dispatch import check_name
from ..parallel.agreement import check_same_batch
from ..parallel.groups import ALONE, Groups
from ..parallel.sequence import SplitLayout
from ..parallel.vocabulary import meet
from ..sequences import SequenceLayout
from ..types import LossOptions, RowOptions, accumulation_dtype
from .ops import LinearTokenLogps
from .plan import check_promise
from .sharded import check_parts, is_sharded, whole
from .workspace import HeadOptions, Needs, check_workspace, tile_size


class Hidden:
    """Checked hidden states with a head and their labels: the TokenSource of a call."""

    def __init__(
        self,
        head: tuple[Tensor, Tensor, Tensor | None],
        labels: Tensor,
        cu_seqlens: Tensor | None,
        rows: RowOptions,
        tiles: tuple[str, float | None, str | None, int | None],
        groups: Groups,
        sequences: bool = True,
    ) -> None:
        hidden = head[0]
        if is_sharded(head[1]) or is_sharded(head[2]):
            check_rows("hidden", hidden, "hidden size")
            for name, x in zip(("weight", "bias"), head[1:], strict=True):
                check_parts(name, x, groups.vocab)
            head = (hidden, whole("weight", head[1]), whole("bias", head[2]))
        dtype = check_head(*head)
        labels = check_labels(labels, hidden, "hidden")
        cu_seqlens = check_cu_seqlens(cu_seqlens, hidden, "hidden")
        if sequences:
            check_padded_or_packed("hidden", hidden, cu_seqlens)
        elif hidden.dim() == 2:
            hidden, labels = hidden.unsqueeze(0), labels.unsqueeze(0)
        else:
            hidden, labels = hidden.flatten(0, -3), labels.flatten(0, -2)
        self.head = (hidden, *head[1:])
        precision, workspace_mb, backend, max_scored_tokens = tiles
        self.options = HeadOptions(
            rows,
            dtype,
            check_precision(precision),
            check_workspace(workspace_mb),
            check_name(backend),
            promised=check_promise(max_scored_tokens),
        )
        self.groups = groups
        self.layout = SequenceLayout(labels, cu_seqlens, rows.ignore_index, rows.shift)
        grad = torch.is_grad_enabled()
        self.needs = Needs(*(grad and x is not None and x.requires_grad for x in self.head))
        if any(self.needs):
            for name, x in zip(("hidden", "weight", "bias"), self.head, strict=True):
                if x is not None:
                    check_savable(name, x)
        if groups is not ALONE:
            self._join_ranks()

    def _join_ranks(self) -> None:
        hidden, weight, _ = self.head
        rows, named = self.options.rows, zip(("hidden", "weight", "bias"), self.needs, strict=True)
        gradients = {f"{name}.requires_grad": need for name, need in named}
        check_same_batch(
            self.groups,
            rows,
            self.layout,
            vocab={
                **gradients,
                "hidden": (hidden.dtype, *hidden.shape),
                "weight": (weight.dtype, f"rows of {weight.shape[1]}"),
                "max_scored_tokens": self.options.promised,
            },
            sequence={**gradients, "weight": (weight.dtype, *weight.shape)},
        )
        if self.groups.sequence is not None:
            self.layout = SplitLayout(self.layout, self.groups.sequence)
        group = self.groups.vocab
        if group is None:
            return
        # every rank has to make the same tiles
        size = tile_size(weight, self.options, self.needs.weight)
        start, total, tile_rows, most_rows = meet(
            group, weight.shape[0], size.rows, size.most_rows, hidden.device
        )
        self.options = self.options._replace(
            rows=rows._replace(vocab_start=start, vocab_total=total),
            vocab_group=group.group_name,
            tile_rows=tile_rows,
            most_rows=most_rows,
        )

    def tokens(self, stats: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(logps [N], stats [3, N], is_top1 [N])."""
        return self._tokens(self.head, self.options, stats, self.needs)

    def _tokens(
        self, head: tuple, options: HeadOptions, stats: bool, needs: Needs
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = self.layout
        return LinearTokenLogps.apply(
            *head, layout.labels, layout.cu_seqlens, options, stats, needs
        )

    def sequence_logps(self, options: LossOptions) -> Tensor:
        logps = self.tokens()[0]
        return self.layout.sequence_logps(logps, options.average_log_prob, options.ld_alpha)

    def reference_logps(self, head: tuple, dtype: torch.dtype, options: LossOptions) -> Tensor:
        """[2P] of what reference_head_of returned, without gradient."""
        head = head if head[1] is not None else (head[0], *self.head[1:])
        with torch.no_grad():
            call = self.options._replace(dtype=dtype)
            logps = self._tokens(head, call, False, Needs(False, False, False))[0]
            sums = self.layout.sequence_logps(logps, options.average_log_prob, options.ld_alpha)
            return sums.to(accumulation_dtype(self.options.dtype))


def reference_head_of(
    source: Hidden,
    reference_hidden: Tensor,
    reference_weight: Tensor | None,
    reference_bias: Tensor | None,
) -> tuple[tuple[Tensor | None, ...], torch.dtype]:
    """(hidden, weight, bias) of the reference, and the dtype of its GEMMs.

    The weight is None where it is the policy's; the dtype holds both models' numbers.
    """
    hidden, weight, bias = source.head
    check_rows("reference_hidden", reference_hidden, "hidden size")
    if reference_hidden.shape[:-1] != hidden.shape[:-1] or reference_hidden.device != hidden.device:
        raise ValueError(
            f"reference_hidden: expected {list(hidden.shape[:-1])} rows on {hidden.device} like "
            f"hidden, got {list(reference_hidden.shape[:-1])} on {reference_hidden.device}"
        )
    if reference_weight is None:
        if reference_bias is not None:
            raise ValueError("reference_bias: given without reference_weight")
        dtype = check_head(reference_hidden, weight, bias, "reference_")
        return (reference_hidden.detach(), None, None), dtype
    with torch.no_grad():
        reference_weight = whole("reference_weight", reference_weight)
        reference_bias = whole("reference_bias", reference_bias)
    dtype = check_head(reference_hidden, reference_weight, reference_bias, "reference_")
    dtype = torch.promote_types(dtype, source.options.dtype)
    if reference_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"reference_weight: expected a vocabulary of {weight.shape[0]} like weight, "
            f"got {reference_weight.shape[0]}"
        )
    bias = None if reference_bias is None else reference_bias.detach()
    reference_hidden = reference_hidden.detach()
    if dtype == torch.float64:
        # the results of an op have the dtype of its hidden states
        reference_hidden = reference_hidden.to(dtype)
    return (reference_hidden, reference_weight.detach(), bias), dtype
