"""torchtune 0.6: ``torchtune.rlhf.get_batch_log_probs`` and ``torchtune.rlhf.loss.DPOLoss``.

The loss in a recipe's YAML::

    loss:
      _component_: dpo_kernels.integrations.torchtune.DPOLoss
      beta: 0.1

The log-probs, which is where the time goes, in the recipe:
``rlhf.get_batch_log_probs = dpo_kernels.integrations.torchtune.get_batch_log_probs``.
"""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from ..losses import make_options


def get_batch_log_probs(
    logits: Tensor,
    labels: Tensor,
    label_pad_token_id: int = -100,
    return_average_logprobs: bool = False,
) -> Tensor:
    """``[B]`` sums (or means) over the labels that are scored; logits at t score label t + 1."""
    return functional.sequence_logps(
        logits, labels, ignore_index=label_pad_token_id, average_log_prob=return_average_logprobs
    )


class DPOLoss(nn.Module):
    """DPO (arXiv:2305.18290, eq. 7), cDPO with ``label_smoothing``, from four log-probs a pair."""

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0):
        super().__init__()
        make_options(beta=beta, loss_type="sigmoid", label_smoothing=label_smoothing)
        self.beta = beta
        self.label_smoothing = label_smoothing

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(losses, chosen_rewards, rejected_rewards)``, ``[P]`` each."""
        return functional.preference_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )
