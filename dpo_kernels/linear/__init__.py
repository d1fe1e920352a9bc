"""The functions from hidden states: the logits are made tile by tile and never held.

With N scored rows, hidden size D and vocabulary V one GEMM of the head costs 2 N D V FLOPs. A
frozen head costs two, under any loss; a trainable one three with linear_dpo_loss. The backward
computes the logits once more, which makes four, for a pair that alone outgrows the workspace (all
pairs that do so together, with max_scored_tokens), for reduction="none", for losses whose gradient
depends on other pairs (aot, aot_unpaired, callables, sft with use_weighting), for sequences that
are split over ranks, and for linear_token_logps, _stats and _sequence_logps with a trainable head.
Reference rows cost one GEMM. Rows that score nothing cost nothing, up to max_scored_tokens.
"""

from .api import (
    linear_dpo_loss,
    linear_sequence_logps,
    linear_token_logps,
    linear_token_stats,
)

__all__ = [
    "linear_dpo_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "linear_token_stats",
]
