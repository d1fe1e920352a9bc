"""One call of a function from hidden states: its checked arguments and its token log-probs."""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import RowOptions
from .checks import (
    check_cu_seqlens,
    check_flag,
    check_ignore_index,
    check_labels,
    check_padded_or_packed,
    check_temperature,
)
from .dispatch import check_name
from .head_passes import Needs
from .layout import SequenceLayout
from .linear_autograd import LinearTokenLogps
from .linear_checks import (
    check_head,
    check_precision,
    check_scale,
    check_softcap,
    check_workspace,
)
from .tiles import LinearOptions


class HeadCall:
    """The head, the layout and the options of a call; raises for arguments that do not fit."""

    def __init__(
        self,
        hidden,
        weight,
        bias,
        labels,
        cu_seqlens=None,
        *,
        ignore_index,
        shift,
        temperature,
        logit_scale,
        logit_softcap,
        precision,
        workspace_mb,
        backend,
        padded_or_packed=True,
    ):
        dtype = check_head(hidden, weight, bias, "")
        labels = check_labels(labels, hidden.shape[:-1], hidden.device, "hidden")
        cu_seqlens = check_cu_seqlens(cu_seqlens, hidden.dim(), hidden.device, "hidden")
        self.shape = labels.shape
        if padded_or_packed:
            check_padded_or_packed("hidden", hidden, cu_seqlens)
        elif hidden.dim() == 2:
            hidden, labels = hidden.unsqueeze(0), labels.unsqueeze(0)
        else:
            hidden, labels = hidden.flatten(0, -3), labels.flatten(0, -2)
        self.head = (hidden, weight, bias)
        rows = RowOptions(
            check_ignore_index(ignore_index),
            check_flag("shift", shift),
            check_scale(logit_scale),
            check_softcap(logit_softcap),
            check_temperature(temperature),
        )
        workspace = check_workspace(workspace_mb)
        name = check_name(backend)
        self.options = LinearOptions(rows, dtype, check_precision(precision), workspace, name)
        self.layout = SequenceLayout(labels, cu_seqlens, rows.ignore_index, rows.shift)
        grad = torch.is_grad_enabled()
        self.needs = Needs(*(grad and x is not None and x.requires_grad for x in self.head))

    @property
    def frozen_head(self) -> bool:
        return not (self.needs.weight or self.needs.bias)

    def tokens(self, stats: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(logps [N], stats [3, N], is_top1 [N])."""
        logps, values, is_top1 = LinearTokenLogps.apply(
            *self.head, self.layout.labels, self.layout.cu_seqlens, self.options, stats, self.needs
        )
        return logps.flatten(), values, is_top1

    def reference_tokens(self, head: tuple) -> Tensor:
        """[N] log-probs of the reference's rows, without gradient."""
        with torch.no_grad():
            return LinearTokenLogps.apply(
                *head,
                self.layout.labels,
                self.layout.cu_seqlens,
                self.options,
                False,
                Needs(False, False, False),
            )[0].flatten()
