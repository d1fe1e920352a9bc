"""What the public functions return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """Per-token values, shaped like the labels, 0 (False) where nothing is scored.

    Only ``logps`` carries a gradient. All are of the distribution ``p = softmax(z)`` that scores
    the token, ``z`` being the logits after scale, softcap and temperature.
    """

    logps: Tensor  # log p[label], in nats
    entropy: Tensor  # -sum p log p, in nats
    mean_logits: Tensor  # mean of z over the vocabulary
    is_top1: Tensor  # bool: the label is the (first) maximum of z
    log_sum_sq_probs: Tensor  # log sum p^2


@dataclass
class DPOOutput:
    """The loss and, detached, what trainers log; ``[P]`` each but ``loss``."""

    loss: Tensor  # scalar, or [P] with reduction="none"
    losses: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor  # beta * (policy - reference) log-prob
    rejected_rewards: Tensor

    def metrics(self) -> dict[str, Tensor]:
        """Batch means under TRL's names, 0-d tensors: no wait for the GPU until one is read."""
        margins = self.chosen_rewards - self.rejected_rewards
        values = {
            "rewards/chosen": self.chosen_rewards,
            "rewards/rejected": self.rejected_rewards,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).to(margins.dtype),
            "logps/chosen": self.chosen_logps,
            "logps/rejected": self.rejected_logps,
        }
        # no pairs: 0, like the loss
        count = max(self.losses.shape[0], 1)
        return {name: value.sum() / count for name, value in values.items()}


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot serve the call; the message says why."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results: float64 for float64 input, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32
