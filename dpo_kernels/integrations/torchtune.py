"""torchtune 0.6: ``torchtune.rlhf.get_batch_log_probs`` and ``torchtune.rlhf.loss.DPOLoss``.

The log-probs, which is where the time goes, are called by the recipe, not by its loss;
``dpo_kernels.patch("torchtune")`` replaces them. A recipe does that from its YAML::

    loss:
      _component_: dpo_kernels.integrations.torchtune.patched_dpo_loss
      beta: 0.1

``DPOLoss`` there, in place of ``patched_dpo_loss``, is the loss alone.
"""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from ..losses import make_options
from ..patching import Seam, patch


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


def patched_dpo_loss(beta: float = 0.1, label_smoothing: float = 0.0) -> DPOLoss:
    """DPOLoss, after ``dpo_kernels.patch("torchtune")``: for a recipe's YAML."""
    patch("torchtune")
    return DPOLoss(beta, label_smoothing)


def seams(version: str) -> list[Seam]:
    return [
        Seam(
            "torchtune.rlhf.sequence_processing:get_batch_log_probs",
            lambda _: get_batch_log_probs,
            ("logits", "labels", "label_pad_token_id", "return_average_logprobs"),
            "log-probs from logits in one pass, prompts left out, float32 from 16-bit logits",
        )
    ]
