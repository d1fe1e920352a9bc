"""The functions of the original DPO repository (eric-mitchell/direct-preference-optimization).

In its trainers.py, replace the two functions by
``from dpo_kernels.integrations.original import _get_batch_logps, preference_loss``.

Refused here, taken there: ``beta=0``, log-probs of no dimension, and ``ipo`` with
``label_smoothing``, which it ignores. Of 16-bit logits and log-probs the results are float32.
"""

from __future__ import annotations

from torch import Tensor

from .. import functional


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    ipo: bool = False,
    reference_free: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``-(1-e) ls(bD) - e ls(-bD)``, or with ``ipo`` ``(D - 1/(2b))^2``, of every pair.

    The rewards are those of the reference that is given, also with ``reference_free``.

    Returns:
        ``(losses, chosen_rewards, rejected_rewards)``, ``[P]`` each.
    """
    reference = (
        (None, None) if reference_free else (reference_chosen_logps, reference_rejected_logps)
    )
    losses, _, _ = functional.preference_loss(
        policy_chosen_logps,
        policy_rejected_logps,
        *reference,
        beta=beta,
        loss_type="ipo" if ipo else "sigmoid",
        label_smoothing=label_smoothing,
        reference_free=reference_free,
    )
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps).detach()
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps).detach()
    return losses, chosen_rewards, rejected_rewards


def _get_batch_logps(logits: Tensor, labels: Tensor, average_log_prob: bool = False) -> Tensor:
    """``[B]`` sums (or means) over the labels that are not -100; logits at t score label t + 1."""
    return functional.sequence_logps(logits, labels, average_log_prob=average_log_prob)
