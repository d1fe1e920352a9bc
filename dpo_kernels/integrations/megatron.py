"""Megatron-Core: the log-probs of tokens from logits whose vocabulary is split over a tensor
parallel group, as ``ColumnParallelLinear`` leaves them with ``gather_output=False``.

``megatron.core.tensor_parallel.vocab_parallel_cross_entropy(logits, target)`` is minus these.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import functional


def vocab_parallel_logps(vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any) -> Tensor:
    """Log-probs of ``target``, float32 and shaped like it, the same on every rank of the group.

    Args:
        vocab_parallel_logits: ``[s, b, V / p]``, or ``[b, s, V / p]``: row and target are of the
            same position. Columns that pad the vocabulary are part of it, as they are for Megatron,
            unless they are sliced off; ranks may hold different numbers of columns.
        target: ids of the whole vocabulary, -100 where nothing is scored (0 in the result).
        tp_group: ``parallel_state.get_tensor_model_parallel_group()``.
    """
    return functional.token_logps(vocab_parallel_logits, target, vocab_group=tp_group)
