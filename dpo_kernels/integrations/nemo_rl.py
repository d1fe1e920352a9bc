"""NeMo-RL: the log-probs that its losses are given, and ``DPOLossFn``.

``get_next_token_logprobs_from_logits`` of ``nemo_rl/distributed/model_utils.py`` is where the time
goes. ``dpo_kernels.patch("nemo_rl")`` replaces it where ``nemo_rl/algorithms/loss/utils.py`` calls
it; the process that computes the loss, a Ray worker, has to call that.

In ``DPOLossFn`` (``nemo_rl/algorithms/loss/loss_functions.py``) pairs are interleaved: row 2i is
the chosen and row 2i + 1 the rejected answer of pair i.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import functional
from ..parallel.groups import add, check_group, gather
from ..patching import Seam
from .trl import log_once

try:
    from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType

    _LOSS_TYPE, _INPUT_TYPE = LossType.SEQUENCE_LEVEL, LossInputType.LOGPROB
except ImportError:
    _LOSS_TYPE, _INPUT_TYPE = "sequence_level", "logprob"


def get_next_token_logprobs_from_logits(
    input_ids: Tensor,
    next_token_logits: Tensor,
    seq_index: Tensor | None = None,
    vocab_parallel_rank: int | None = None,
    vocab_parallel_group: Any = None,
    context_parallel_group: Any = None,
    sampling_params: Any = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probs of every next token, ``[B, S - 1]`` float32, from ``[B, S, V]`` logits.

    Args:
        next_token_logits: with a vocab_parallel_group this rank's columns, with a
            context_parallel_group its two slices of the padded sequence, as Megatron balances them;
            or a DTensor that one dimension of a mesh shards by its columns.
        vocab_parallel_rank: only kept; the group knows it.
        chunk_size: only kept; no float32 copy of the logits is made, whole or in chunks.

    Returns:
        The log-probs of the whole sequences, on every rank. Of a context parallel group each rank
        is taken to use them all, so their gradients are added up over it, as NeMo-RL's own are.

    Raises:
        ValueError: for filtering by top-k or top-p, and for DTensors that are split along the
            sequence (seq_index), which are not served here.
    """
    reason = _not_served(seq_index, sampling_params)
    if reason is not None:
        raise ValueError(reason)
    vocab_group = check_group("vocab_parallel_group", vocab_parallel_group)
    context_group = check_group("context_parallel_group", context_parallel_group)
    labels = input_ids.to(next_token_logits.device)
    if context_group is None:
        logps = functional.token_logps(
            next_token_logits, labels, shift=True, vocab_group=vocab_group
        )
        return logps[:, 1:]
    ranks, rows = context_group.size(), next_token_logits.shape[1]
    missing = ranks * rows - labels.shape[1]
    if rows % 2 or missing < 0:
        raise ValueError(
            f"next_token_logits: expected two slices of a sequence of {labels.shape[1]} tokens, "
            f"padded to a multiple of {2 * ranks}, got {rows} rows"
        )
    # aligned, and nothing is scored by the last token and by padding
    labels = torch.nn.functional.pad(labels[:, 1:], (0, missing + 1), value=-100)
    own = _slices(labels, ranks, context_group.rank())
    logps = functional.token_logps(next_token_logits, own, vocab_group=vocab_group)
    return _WholeSequences.apply(logps, context_group)[:, : input_ids.shape[1] - 1]


def _not_served(seq_index: Any, sampling_params: Any) -> str | None:
    """Why NeMo-RL's own function has to take a call, naming the argument, or None."""
    if seq_index is not None:
        return (
            "seq_index: DTensors that are split along the sequence are not supported; expected "
            "None, and a context_parallel_group where ranks have slices"
        )
    top_k = getattr(sampling_params, "top_k", None)
    top_p = getattr(sampling_params, "top_p", 1.0)
    if top_k not in (None, -1) or top_p not in (None, 1.0):
        return f"sampling_params: filtered distributions are not supported, got {top_k=}, {top_p=}"
    return None


def _or_theirs(original: Callable) -> Callable:
    """This package's log-probs, and NeMo-RL's own for what they do not serve."""

    takes = inspect.signature(original)

    @functools.wraps(original)
    def logprobs(*args, **kwargs) -> Tensor:
        given = takes.bind(*args, **kwargs).arguments
        reason = _not_served(given.get("seq_index"), given.get("sampling_params"))
        if reason is None:
            return get_next_token_logprobs_from_logits(**given)
        log_once("dpo_kernels leaves NeMo-RL's log-probs to NeMo-RL", reason)
        return original(*args, **kwargs)

    return logprobs


def _slices(whole: Tensor, ranks: int, rank: int) -> Tensor:
    """Of 2R slices of a sequence rank r has the r-th from the front, and from the end."""
    slices = whole.chunk(2 * ranks, dim=1)
    return torch.cat((slices[rank], slices[2 * ranks - 1 - rank]), dim=1)


class _WholeSequences(torch.autograd.Function):
    """The slices of all ranks, in the order of the tokens."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = gather("context_parallel_group", group, "log-probs", own)
        fronts, ends = parts.chunk(2, dim=2)
        return torch.cat((*fronts, *ends.flip(0)), dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        group = ctx.group
        total = add("context_parallel_group", group, "gradients of log-probs", grad.clone())
        return _slices(total, group.size(), group.rank()), None


def seams(version: str | None) -> list[Seam]:
    return [
        Seam(
            "nemo_rl.algorithms.loss.utils:get_next_token_logprobs_from_logits",
            _or_theirs,
            (
                "input_ids",
                "next_token_logits",
                "seq_index",
                "vocab_parallel_rank",
                "vocab_parallel_group",
                "context_parallel_group",
                "sampling_params",
                "chunk_size",
            ),
            "log-probs from logits in one pass, without a float32 copy of them",
        )
    ]


class DPOLossFn:
    """``w_p L_pref + w_s L_sft`` over interleaved pairs; see __call__.

    Args:
        cfg: NeMo-RL's DPOLossConfig, or a dict of its fields: reference_policy_kl_penalty (beta),
            preference_loss_weight, sft_loss_weight, preference_average_log_probs and
            sft_average_log_probs.
        use_fused_linear_logprobs: only kept; NeMo-RL reads it to know what its model returns.
    """

    loss_type = _LOSS_TYPE
    input_type = _INPUT_TYPE

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False):
        fields = dict(cfg) if isinstance(cfg, dict) else vars(cfg)
        self.reference_policy_kl_penalty = fields["reference_policy_kl_penalty"]
        self.preference_loss_weight = fields["preference_loss_weight"]
        self.sft_loss_weight = fields["sft_loss_weight"]
        self.preference_average_log_probs = fields["preference_average_log_probs"]
        self.sft_average_log_probs = fields["sft_average_log_probs"]
        self.use_fused_linear_logprobs = use_fused_linear_logprobs

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: dict[str, Tensor],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor | None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of a microbatch, normalised by the valid sequences of the whole batch.

        Args:
            next_token_logprobs: ``[2P, S - 1]``.
            data: ``token_mask`` and ``reference_policy_logprobs`` ``[2P, S]`` (the latter aligned
                like logits: entry t is of token t + 1), and ``sample_mask`` ``[2P]``.
            global_valid_seqs: number of valid sequences, twice that of pairs.

        Returns:
            The scalar loss, and NeMo-RL's metrics as floats (read with one synchronisation).
        """
        token_mask = data["token_mask"][:, 1:]
        sample_mask = data["sample_mask"]
        counts = token_mask.sum(-1).clamp(min=1)
        policy = (next_token_logprobs * token_mask).sum(-1)
        given = (data["reference_policy_logprobs"][:, :-1] * token_mask).sum(-1)
        averaged = counts if self.preference_average_log_probs else 1
        policy_pairs, reference_pairs = (_split(x / averaged) for x in (policy, given))
        losses, *_ = functional.preference_loss(
            *policy_pairs, *reference_pairs, beta=self.reference_policy_kl_penalty
        )
        rewards = [(x - ref).detach() for x, ref in zip(policy_pairs, reference_pairs, strict=True)]
        chosen_mask, rejected_mask = _split(sample_mask)
        # the 1e-8 keeps a batch without valid pairs at 0
        pairs = global_valid_seqs / 2 + 1e-8
        preference = (losses * chosen_mask).sum() / pairs
        loss = self.preference_loss_weight * preference
        sft = torch.zeros_like(preference)
        if self.sft_loss_weight > 0:
            nll, _ = _split(-policy / (counts if self.sft_average_log_probs else 1))
            sft = (nll * chosen_mask).sum() / pairs
            loss = loss + self.sft_loss_weight * sft
        values = {
            "loss": loss,
            "sft_loss": sft,
            "preference_loss": preference,
            "accuracy": ((rewards[0] > rewards[1]) * chosen_mask).sum() / pairs,
            "rewards_chosen_mean": (rewards[0] * chosen_mask).sum() / pairs,
            "rewards_rejected_mean": (rewards[1] * rejected_mask).sum() / pairs,
            "num_valid_samples": sample_mask.sum() / 2,
        }
        floats = torch.stack([value.detach().float() for value in values.values()]).tolist()
        return loss, dict(zip(values, floats, strict=True))


def _split(per_sequence: Tensor) -> tuple[Tensor, Tensor]:
    return per_sequence[::2], per_sequence[1::2]
