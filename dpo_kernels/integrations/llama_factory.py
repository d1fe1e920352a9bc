"""LLaMA-Factory's log-probs: ``src/llamafactory/train/trainer_utils.py``, ``get_batch_logps``.

``from dpo_kernels.integrations.llama_factory import get_batch_logps`` in train/dpo/trainer.py and
train/kto/trainer.py is the whole change; its losses are TRL's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ..sequences import SequenceLayout


def get_batch_logps(
    logits: Tensor,
    labels: Tensor,
    label_pad_token_id: int = -100,
    ld_alpha: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums of the log-probs of the labels, and how many labels were scored.

    With ``ld_alpha`` (LD-DPO), a token weighs ``ld_alpha`` once it lies as many positions beyond
    the first scored one as the shorter answer of its pair has scored tokens.

    Returns:
        ``(logps [B] float32, lengths [B] int64)``.
    """
    rows = {"ignore_index": label_pad_token_id, "shift": True}
    layout = SequenceLayout(labels, None, **rows)
    lengths = layout.lengths
    if ld_alpha is None:
        return functional.sequence_logps(logits, labels, **rows), lengths
    logps = functional.token_logps(logits, labels, **rows)
    scored = layout.scored.view(labels.shape)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    position = torch.arange(labels.shape[-1], device=labels.device)
    beyond = position >= (scored.int().argmax(-1) + shared).unsqueeze(-1)
    return torch.where(beyond, ld_alpha * logps, logps).sum(-1), lengths
