"""LLaMA-Factory: the log-probs of its DPO and KTO trainers (``src/llamafactory/train``).

Its trainers make a model's logits, cast them to float32 and hand them to ``get_batch_logps``.
``dpo_kernels.patch("llamafactory")``, before training starts, makes the log-probs inside the
model's head: no logits, no cast. Its losses are TRL's and stay that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..patching import Seam
from ..sequences import SequenceLayout
from .heads import scoring_head


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
    if ld_alpha is None:
        layout = SequenceLayout(labels, None, **rows)
        return functional.sequence_logps(logits, labels, **rows), layout.lengths
    logps = functional.token_logps(logits, labels, **rows)
    return _sums(logps, labels, label_pad_token_id, ld_alpha)


def _sums(
    logps: Tensor, labels: Tensor, ignore_index: int, ld_alpha: float | None
) -> tuple[Tensor, Tensor]:
    """What get_batch_logps returns, from the log-probs of tokens."""
    layout = SequenceLayout(labels, None, ignore_index, shift=True)
    lengths = layout.lengths
    if ld_alpha is None:
        return layout.sequence_logps(logps.flatten(), False, None), lengths
    scored = layout.scored.view(labels.shape)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    position = torch.arange(labels.shape[-1], device=labels.device)
    beyond = position >= (scored.int().argmax(-1) + shared).unsqueeze(-1)
    return torch.where(beyond, ld_alpha * logps, logps).sum(-1), lengths


def _logps_of_model(
    model: Any, inputs: dict, labels: Tensor, ld_alpha: float | None = None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Of a forward that makes no logits if it can.

    Returns:
        ``(log-probs [B], lengths [B], mean logits [B], logits in a row)``.
    """
    with scoring_head(model, labels, shift=True, means=True) as head:
        logits = model(**inputs, return_dict=True, use_cache=False).logits
    # a weight that is sharded has another size by now
    if head.mean_logits is not None and head.vocabulary is not None:
        sums, lengths = _sums(head.logps_through(logits), labels, -100, ld_alpha)
        return sums, lengths, head.mean_logits, labels.shape[1] * head.vocabulary
    means = logits.detach().flatten(1).mean(-1, dtype=torch.float32)
    return *get_batch_logps(logits, labels, ld_alpha=ld_alpha), means, logits[0].numel()


def dpo_concatenated_forward(original: Callable) -> Callable:
    """CustomDPOTrainer.concatenated_forward; the logits that it returns are their means a row."""

    def concatenated_forward(self, model, batch: dict, is_ref_model: bool = False) -> dict:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        ld_alpha = None if is_ref_model else self.ld_alpha
        logps, lengths, means, _ = _logps_of_model(model, inputs, batch["labels"], ld_alpha)
        averages = logps / lengths
        if self.loss_type in ("ipo", "orpo", "simpo"):
            logps = averages
        chosen_logps, rejected_logps = logps.chunk(2)
        chosen_means, rejected_means = means.chunk(2)
        return {
            "chosen_logps": chosen_logps,
            "rejected_logps": rejected_logps,
            "chosen_logits": chosen_means,
            "rejected_logits": rejected_means,
            "chosen_logps_avg": averages.chunk(2)[0],
        }

    return concatenated_forward


_KTO_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "cross_attention_mask")
# an answer's own and the KL answer's have the same pictures
_KTO_SHARED = (
    "pixel_values",
    "image_sizes",
    "image_grid_thw",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
)


def kto_forward(original: Callable) -> Callable:
    """CustomKTOTrainer.forward; the logits that it returns are their sums a row."""

    def forward(self, model, batch: dict, prefix: str = "") -> tuple[Tensor, Tensor, Tensor]:
        inputs = {name: batch[prefix + name] for name in _KTO_INPUTS if prefix + name in batch} | {
            name: batch[name] for name in _KTO_SHARED if name in batch
        }
        labels = batch[f"{prefix}labels"]
        logps, lengths, means, count = _logps_of_model(model, inputs, labels)
        return means * count, logps, logps / lengths

    return forward


def seams(version: str) -> list[Seam]:
    from packaging.version import Version

    if Version(version).release < (0, 9, 4):
        raise ImportError(f'patch("llamafactory") needs llamafactory >= 0.9.4, got {version}')
    gain = "the log-probs are made in the model's head: no logits, no float32 copy of them"
    return [
        Seam(
            "llamafactory.train.dpo.trainer:CustomDPOTrainer.concatenated_forward",
            dpo_concatenated_forward,
            ("self", "model", "batch", "is_ref_model"),
            gain,
        ),
        Seam(
            "llamafactory.train.kto.trainer:CustomKTOTrainer.forward",
            kto_forward,
            ("self", "model", "batch", "prefix"),
            gain,
        ),
        Seam(
            "llamafactory.train.trainer_utils:get_batch_logps",
            lambda _: get_batch_logps,
            ("logits", "labels", "label_pad_token_id", "ld_alpha"),
            "fused, where something else calls it with logits",
        ),
    ]
