"""What the public functions return, and the options of a call that travel as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node


class TokenStats(NamedTuple):
    """Per-token values, shaped like the labels, 0 (False) where nothing is scored.

    Only ``logps`` carries a gradient. All are of the distribution ``p = softmax(z)`` that scores
    the token, ``z`` being the logits after scale, softcap and temperature.

    Attributes:
        logps: ``log p[label]``, in nats.
        entropy: ``-sum p log p``, in nats.
        mean_logits: mean of ``z`` over the vocabulary.
        is_top1: bool, the label is the (first) maximum of ``z``.
        log_sum_sq_probs: ``log sum p^2``.
    """

    logps: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    log_sum_sq_probs: Tensor

    @staticmethod
    def of(logps: Tensor, values: Tensor, is_top1: Tensor) -> TokenStats:
        """Shaped like ``logps``, from the stacked values of token_forward."""
        entropy, mean_logits, log_sum_sq_probs = values.view(3, *logps.shape).unbind(0)
        return TokenStats(logps, entropy, mean_logits, is_top1.view(logps.shape), log_sum_sq_probs)


@dataclass(init=False, eq=False, repr=False)
class DPOOutput:
    """The loss and, detached, what trainers log.

    A pytree of its six tensors. ``loss`` carries the graph, which cannot be copied: a deep copy is
    detached, and dataclasses.asdict has the other five. DistributedDataParallel with
    find_unused_parameters=True looks for the graph in those five, and raises in backward: return
    ``output.loss`` there, by itself or in a tuple or dict.

    Attributes:
        loss: a scalar, or ``[P]`` with ``reduction="none"``.
        losses: ``[P]``, before the reduction.
        chosen_logps: ``[P]`` log-probs of the policy, in nats.
        rejected_logps: the same of the rejected answers.
        chosen_rewards: ``[P]``, beta * (policy - reference) log-prob.
        rejected_rewards: the same of the rejected answers.
    """

    losses: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    def __init__(
        self,
        loss: Tensor,
        losses: Tensor,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        chosen_rewards: Tensor,
        rejected_rewards: Tensor,
    ) -> None:
        self.loss = loss
        self.losses = losses
        self.chosen_logps = chosen_logps
        self.rejected_logps = rejected_logps
        self.chosen_rewards = chosen_rewards
        self.rejected_rewards = rejected_rewards

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in _OUTPUT_NAMES)
        return f"DPOOutput({values})"

    def __deepcopy__(self, memo: dict[int, Any]) -> DPOOutput:
        return DPOOutput(*(getattr(self, name).detach().clone() for name in _OUTPUT_NAMES))

    def metrics(self) -> dict[str, Tensor]:
        """What trainers log of the batch, under TRL's names.

        Returns:
            Means over the pairs, as detached 0-d tensors, so that nothing waits for a GPU until a
            value is read; 0 for an empty batch. ``rewards/chosen``, ``rewards/rejected``,
            ``rewards/margins`` (chosen - rejected), ``rewards/accuracies`` (share of the pairs with
            a margin above 0), ``logps/chosen`` and ``logps/rejected``.
        """
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


_OUTPUT_NAMES = ("loss", *(field.name for field in fields(DPOOutput)))

# what walks the outputs of a module (DDP with static_graph, torch.export) finds the tensors
register_pytree_node(
    DPOOutput,
    lambda out: ([getattr(out, name) for name in _OUTPUT_NAMES], None),
    lambda values, _: DPOOutput(*values),
    serialized_type_name="dpo_kernels.DPOOutput",
)


class Tokens(NamedTuple):
    """What a forward gives of N tokens; csrc/launchers.h says what of a shard."""

    tokens: Tensor  # [3, N]: logps, row_max, log_sum
    stats: Tensor  # [3, N]: entropy, mean_logits, log_sum_sq_probs; empty where not asked for
    is_top1: Tensor  # [N]; likewise


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot serve the call; the message says why."""


class RowOptions(NamedTuple):
    """How rows are scored; the order is that of the ops' schemas."""

    ignore_index: int
    shift: bool
    scale: float
    softcap: float  # 0: none
    temperature: float
    # the shard of the vocabulary that the logits are, from this column of so many; (0, 0): all
    vocab_start: int = 0
    vocab_total: int = 0


class LossOptions(NamedTuple):
    """What becomes of the log-probs of tokens: every option of a loss that is not a tensor.

    Made and validated once a call, by losses.make_options. The order is that of linear_dpo's
    schema.
    """

    loss_types: tuple[str | Callable[[Tensor, Tensor], Tensor], ...]
    loss_weights: tuple[float, ...]
    beta: float
    label_smoothing: float
    reference_free: bool
    f_divergence: str
    f_alpha_divergence_coef: float
    discopop_tau: float
    simpo_gamma: float
    average_log_prob: bool
    ld_alpha: float | None
    use_weighting: bool
    reduction: str


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results: float64 for float64 input, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32
