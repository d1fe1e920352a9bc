"""DeepSpeed-Chat: ``get_batch_logps`` of training/step2_dpo_finetuning/main.py."""

from __future__ import annotations

from torch import Tensor

from .. import functional


def get_batch_logps(logits: Tensor, input_ids: Tensor, label_mask: Tensor) -> Tensor:
    """``[B]`` sums of the log-probs of ``input_ids`` where ``label_mask`` is 1.

    Logits at t score token t + 1.
    """
    return functional.sequence_logps(logits, input_ids.masked_fill(label_mask == 0, -100))
