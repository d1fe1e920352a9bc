"""The functions as nn.Modules, with their options in the constructor."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from .checks import check_flag, check_precision, check_row_options
from .dispatch import check_name
from .functional import dpo_loss
from .linear import linear_dpo_loss
from .linear.plan import check_promise
from .linear.workspace import check_workspace
from .losses import make_options
from .parallel.groups import check_groups
from .types import DPOOutput, TokenStats

_OF_A_BATCH = {
    "cu_seqlens",
    "reference_logits",
    "reference_hidden",
    "reference_weight",
    "reference_bias",
    "bias",
}


class _PreferenceModule(nn.Module):
    """Holds keyword options, validated when the module is made."""

    def __init__(self, options: dict):
        super().__init__()
        known = make_options.__kwdefaults__
        make_options(**{name: value for name, value in options.items() if name in known})
        check_row_options(
            options.get("ignore_index", -100),
            options.get("shift", True),
            options.get("temperature", 1.0),
            options.get("logit_scale", 1.0),
            options.get("logit_softcap"),
        )
        check_groups(
            options.get("vocab_group"), options.get("sequence_group"), options.get("shift", True)
        )
        check_name(options.get("backend"))
        check_precision(options.get("precision", "exact"))
        check_workspace(options.get("workspace_mb"))
        check_promise(options.get("max_scored_tokens"))
        for flag in ("inplace_backward", "return_stats"):
            check_flag(flag, options.get(flag, False))
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class DPOLoss(_PreferenceModule):
    """dpo_loss with its options held: ``DPOLoss(beta=0.1)(policy_logits, labels, ref_w, ref_l)``.

    Takes every keyword of dpo_loss but ``cu_seqlens`` and ``reference_logits``, which belong to a
    batch and are passed with it.
    """

    def __init__(self, *, beta: float = 0.1, loss_type="sigmoid", **options):
        super().__init__({"beta": beta, "loss_type": loss_type, **_known(dpo_loss, options)})

    def forward(
        self,
        policy_logits: Tensor,
        labels: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        *,
        reference_logits: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> DPOOutput:
        return dpo_loss(
            policy_logits,
            labels,
            reference_chosen_logps,
            reference_rejected_logps,
            reference_logits=reference_logits,
            cu_seqlens=cu_seqlens,
            **self.options,
        )


class LinearDPOLoss(_PreferenceModule):
    """linear_dpo_loss with its options held: ``loss(hidden, lm_head.weight, labels, ...)``.

    Takes every keyword of linear_dpo_loss but the tensors, which are passed with a batch.
    """

    def __init__(self, *, beta: float = 0.1, loss_type="sigmoid", **options):
        super().__init__({"beta": beta, "loss_type": loss_type, **_known(linear_dpo_loss, options)})

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        reference_hidden: Tensor | None = None,
        reference_weight: Tensor | None = None,
        reference_bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> DPOOutput | tuple[DPOOutput, TokenStats]:
        return linear_dpo_loss(
            hidden,
            weight,
            labels,
            reference_chosen_logps,
            reference_rejected_logps,
            bias=bias,
            reference_hidden=reference_hidden,
            reference_weight=reference_weight,
            reference_bias=reference_bias,
            cu_seqlens=cu_seqlens,
            **self.options,
        )


def _known(function, options: dict) -> dict:
    allowed = set(inspect.unwrap(function).__kwdefaults__) - _OF_A_BATCH
    unknown = sorted(set(options) - allowed)
    if unknown:
        raise TypeError(f"{unknown[0]}: {function.__name__} takes {', '.join(sorted(allowed))}")
    return options
