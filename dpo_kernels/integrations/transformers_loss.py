"""transformers: a ``loss_function`` for its models, in a loop of one's own or in Trainer.

dpo_kernels.integrations.transformers_loss.DPOLossFunction(beta=0.1).attach(model)
output = model(
    input_ids,
    attention_mask=attention_mask,
    labels=labels,
    reference_chosen_logps=reference_chosen_logps,
    reference_rejected_logps=reference_rejected_logps,
)
output.loss.backward()

Under transformers.Trainer the batches hold what model() is given here, the chosen answers first,
which takes ``remove_unused_columns=False`` and a collator of one's own. ``attach`` comes before the
Trainer is made.
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

    def attach(self, model: Any) -> None:
        """Makes this the loss of ``model``, a model of transformers or one of PEFT around it.

        Trainer then takes the mean over accumulation steps and processes itself. By default it
        leaves that to the loss and passes it ``num_items_in_batch``, which counts tokens and cannot
        normalise a mean over pairs.
        """
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        if not hasattr(model, "loss_function"):
            raise TypeError(
                "model: expected a model of transformers, which has a loss_function, got "
                f"{type(model).__name__}"
            )
        model.loss_function = self
        model.accepts_loss_kwargs = False

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        *,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """The loss of ``[2P, T, V]`` logits, the chosen answers first.

        ``unused``: what a model was given for its layers, and passes to its loss too.
        """
        if num_items_in_batch is not None:
            raise ValueError(
                "num_items_in_batch: expected None, as a number of tokens cannot normalise a mean "
                f"over pairs, got {num_items_in_batch}; for transformers.Trainer set the loss by "
                "DPOLossFunction(...).attach(model), before the Trainer is made"
            )
        if shift_labels is not None:
            raise ValueError(
                "shift_labels: expected None, as labels are shifted here and sequences have to be "
                f"whole, got {list(shift_labels.shape)}"
            )
        self.output = functional.dpo_loss(
            logits, labels, reference_chosen_logps, reference_rejected_logps, **self.options
        )
        return self.output.loss
