"""OpenRLHF: log_probs_from_logits of ``openrlhf/models/utils.py``, DPOLoss of its ``loss.py``."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from ..losses import make_options


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """``log softmax(logits / temperature)[label]`` for every row, shaped like ``labels``.

    Unlike OpenRLHF's, it is float32 for 16-bit logits too and leaves the logits as they are.
    """
    return functional.token_logps(logits, labels, temperature=temperature)


class DPOLoss(nn.Module):
    """DPO (arXiv:2305.18290, eq. 7), cDPO with ``label_smoothing``, or IPO of what is given."""

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        make_options(
            beta=beta, loss_type="ipo" if ipo else "sigmoid", label_smoothing=label_smoothing
        )
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.ipo = ipo

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(mean loss, chosen_rewards [P], rejected_rewards [P])``."""
        losses, chosen_rewards, rejected_rewards = functional.preference_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            beta=self.beta,
            loss_type="ipo" if self.ipo else "sigmoid",
            label_smoothing=self.label_smoothing,
        )
        return losses.mean(), chosen_rewards, rejected_rewards
