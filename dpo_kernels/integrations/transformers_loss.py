"""transformers: a ``loss_function`` for its models.

model.loss_function = dpo_kernels.integrations.transformers_loss.DPOLossFunction(beta=0.1)
output = model(
    input_ids,
    attention_mask=attention_mask,
    labels=labels,
    reference_chosen_logps=reference_chosen_logps,
    reference_rejected_logps=reference_rejected_logps,
)
output.loss.backward()
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import functional
from ..types import DPOOutput


class DPOLossFunction:
    """The DPO loss as a transformers model calls its loss: from its logits, labels unshifted.

    Args:
        options: those of dpo_loss but ``shift``: ``beta``, ``loss_type`` and so on. The reference's
            log-probs go to the model's forward, which hands them on.

    Attributes:
        output: the DPOOutput of the last call, for its metrics.
    """

    def __init__(self, **options: Any):
        self.options = options
        self.output: DPOOutput | None = None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        *,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """The loss of ``[2P, T, V]`` logits, the chosen answers first.

        ``unused``: what transformers passes to every loss (num_items_in_batch and others).
        """
        self.output = functional.dpo_loss(
            logits, labels, reference_chosen_logps, reference_rejected_logps, **self.options
        )
        return self.output.loss
