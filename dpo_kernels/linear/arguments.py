"""The keywords of linear_dpo_loss, for its overloads: type checkers alone import this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor
from torch.distributed import ProcessGroup

from ..losses import LossType


class LinearDPOArguments(TypedDict, total=False):
    """All but return_stats, which says what linear_dpo_loss returns."""

    bias: Tensor | None
    reference_hidden: Tensor | None
    reference_weight: Tensor | None
    reference_bias: Tensor | None
    logit_scale: float
    logit_softcap: float | None
    precision: str
    workspace_mb: float | None
    max_scored_tokens: int | None
    beta: float
    loss_type: LossType
    label_smoothing: float
    reference_free: bool
    average_log_prob: bool
    ignore_index: int
    shift: bool
    cu_seqlens: Tensor | None
    reduction: str
    temperature: float
    backend: str | None
    loss_weights: Sequence[float] | None
    f_divergence: str
    f_alpha_divergence_coef: float
    discopop_tau: float
    simpo_gamma: float
    ld_alpha: float | None
    use_weighting: bool
    vocab_group: ProcessGroup | None
    sequence_group: ProcessGroup | None
