"""The DPO loss and its gradient, exact and fused.

From logits: dpo_loss, sequence_logps, token_logps, token_stats. Every preference loss from four
log-probs: preference_loss. The same in plain PyTorch: dpo_kernels.reference.
"""

from . import reference
from .dispatch import available_backends
from .functional import dpo_loss, preference_loss, sequence_logps, token_logps, token_stats
from .modules import DPOLoss
from .types import BackendUnavailableError, DPOOutput, TokenStats

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "DPOLoss",
    "DPOOutput",
    "TokenStats",
    "available_backends",
    "dpo_loss",
    "preference_loss",
    "reference",
    "sequence_logps",
    "token_logps",
    "token_stats",
]
