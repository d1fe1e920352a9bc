"""The DPO loss and its gradient, exact and fused.

From logits: dpo_loss, sequence_logps, token_logps, token_stats. From hidden states, without ever
holding the logits: the same names after linear_. Every preference loss from four log-probs:
preference_loss. The same in plain PyTorch, to check against: dpo_kernels.reference.
"""

from . import reference
from .dispatch import available_backends
from .functional import dpo_loss, preference_loss, sequence_logps, token_logps, token_stats
from .linear import (
    linear_dpo_loss,
    linear_sequence_logps,
    linear_token_logps,
    linear_token_stats,
)
from .modules import DPOLoss, LinearDPOLoss
from .patching import patch
from .types import BackendUnavailableError, DPOOutput, TokenStats

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "DPOLoss",
    "DPOOutput",
    "LinearDPOLoss",
    "TokenStats",
    "available_backends",
    "dpo_loss",
    "linear_dpo_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "linear_token_stats",
    "patch",
    "preference_loss",
    "reference",
    "sequence_logps",
    "token_logps",
    "token_stats",
]
