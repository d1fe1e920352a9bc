"""OpenRLHF: the log-probs of its Actor (``openrlhf/models/actor.py``), DPOLoss of its ``loss.py``.

The Actor casts a model's logits to float32 and scores every one of them.
``dpo_kernels.patch("openrlhf")``, before training starts and in every process (PPO's are Ray's),
makes the log-probs inside the model's head: no logits, no cast.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import functional
from ..losses import make_options
from ..patching import Seam
from .heads import current_head, scoring_head


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


def actor_forward(original: Callable) -> Callable:
    """Actor.forward with its model's head scoring the tokens, where log-probs are all it wants."""
    takes = inspect.signature(original)

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        given = takes.bind(self, *args, **kwargs)
        given.apply_defaults()
        options = given.arguments
        scores = options["return_logprobs"] or options["action_mask"] is not None
        if not scores or options["return_entropy"]:
            return original(self, *args, **kwargs)
        with scoring_head(self.model, shift=False, temperature=self.temperature) as head:
            if not getattr(self, "packing_samples", False):
                # as the Actor makes its labels: the last of a row are dropped afterwards
                head.labels = torch.roll(options["sequences"], -1, 1)
            results = original(self, *args, **kwargs)
        if options["return_output"] and head.logps is not None:
            # nobody shall take the log-probs for logits
            results[1]["logits"] = None
        return results

    return forward


def labels_of_packed(original: Callable) -> Callable:
    """unpad_and_slice_tensor, which makes the labels of a packed batch."""

    @functools.wraps(original)
    def unpad_and_slice_tensor(sequences, attention_mask, ring_attn_group):
        packed = original(sequences, attention_mask, ring_attn_group)
        head = current_head()
        if head is not None:
            head.labels = packed[2]
        return packed

    return unpad_and_slice_tensor


def log_probs_found_in_head(original: Callable) -> Callable:
    """log_probs_from_logits, for what Actor.forward takes for logits."""

    @functools.wraps(original)
    def log_probs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        head = current_head()
        if head is not None and head.logps is not None:
            return head.logps_through(logits)
        return log_probs_from_logits(logits, labels, temperature)

    return log_probs


def seams(version: str) -> list[Seam]:
    gain = "the log-probs are made in the model's head: no logits, no float32 copy of them"
    return [
        Seam(
            "openrlhf.models.actor:Actor.forward",
            actor_forward,
            (
                "self",
                "sequences",
                "action_mask",
                "attention_mask",
                "return_output",
                "allgather_logits",
                "return_logprobs",
                "ring_attn_group",
                "packed_seq_lens",
                "return_entropy",
                "mm_inputs",
            ),
            gain,
        ),
        Seam(
            "openrlhf.models.ring_attn_utils:unpad_and_slice_tensor",
            labels_of_packed,
            ("sequences", "attention_mask", "ring_attn_group"),
            "the same for packed samples",
        ),
        Seam(
            "openrlhf.models.utils:log_probs_from_logits",
            log_probs_found_in_head,
            ("logits", "labels", "temperature"),
            "fused, where logits are made all the same",
        ),
    ]
