"""From sequence log-probs to DPOOutput: the reference joined, the losses, the reduction."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .checks import check_sequence_logps
from .losses import PairLogps, needs_reference, pair_losses, takes_lengths
from .sequences import SequenceLayout
from .types import DPOOutput, LossOptions, TokenStats, accumulation_dtype

_NAMES = ("reference_chosen_logps", "reference_rejected_logps")


class TokenSource(Protocol):
    """A batch and where the log-probs of its tokens come from: logits, or a head."""

    layout: SequenceLayout

    def tokens(self, stats: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(logps [N], stats [3, N], is_top1 [N])."""
        ...

    def sequence_logps(self, options: LossOptions) -> Tensor:
        """[2P]."""
        ...


def compose(
    source: TokenSource,
    reference_logps: Tensor | None,
    options: LossOptions,
    return_stats: bool = False,
) -> tuple[DPOOutput, TokenStats | None]:
    """Any loss on top of log-probs: autograd hands its gradient to what made them."""
    stats = weights = None
    if return_stats or options.use_weighting:
        layout = source.layout
        logps, values, is_top1 = source.tokens(stats=True)
        stats = TokenStats.of(logps.detach(), values, is_top1)
        aligned = stats.logps - stats.log_sum_sq_probs if options.use_weighting else None
        sums, weights = layout.logps_and_weights(
            logps, aligned, options.average_log_prob, options.ld_alpha
        )
    else:
        sums = source.sequence_logps(options)
    # to count them takes launches of their own where no kernel has
    lengths = source.layout.lengths if _divides_by_lengths(options) else None
    return pair_output(sums, reference_logps, lengths, options, weights), stats


def _divides_by_lengths(options: LossOptions) -> bool:
    # means are divided already
    return takes_lengths(options) and not options.average_log_prob


def is_made_by_kernels(options: LossOptions) -> bool:
    """Whether this is the loss that the kernels make inside their forward launch."""
    return (
        options.loss_types == ("sigmoid",)
        and options.loss_weights == (1.0,)
        and options.f_divergence == "reverse_kl"
        and options.ld_alpha is None
        and not options.use_weighting
    )


def pair_output(
    logps: Tensor,
    reference_logps: Tensor | None,
    lengths: Tensor | None,
    options: LossOptions,
    weights: Tensor | None = None,
) -> DPOOutput:
    """DPOOutput from [2P] sequence log-probs, the reference's, and numbers of scored tokens.

    The lengths may be None where the loss does not divide by them.
    """
    lengths = lengths if _divides_by_lengths(options) else None
    pairs = make_pairs(logps, reference_logps, lengths, options)
    losses = pair_losses(pairs)
    if weights is not None:
        losses = losses * weights
    return DPOOutput(
        reduce_losses(losses, options.reduction),
        losses.detach(),
        pairs.policy_chosen.detach(),
        pairs.policy_rejected.detach(),
        *rewards_of(pairs),
    )


def make_pairs(
    logps: Tensor, reference_logps: Tensor | None, lengths: Tensor | None, options: LossOptions
) -> PairLogps:
    """PairLogps from [2P] each; without a reference its log-probs are 0."""
    chosen, rejected = logps.chunk(2)
    if reference_logps is None:
        zeros = torch.zeros_like(chosen, requires_grad=False)
        reference = (zeros, zeros)
    else:
        reference = reference_logps.chunk(2)
    chosen_lengths, rejected_lengths = (None, None) if lengths is None else lengths.chunk(2)
    return PairLogps(
        chosen,
        rejected,
        reference[0],
        reference[1],
        chosen - reference[0],
        rejected - reference[1],
        chosen_lengths,
        rejected_lengths,
        options,
    )


def rewards_of(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """``(beta c, beta r)``, detached."""
    beta = pairs.options.beta
    return (beta * pairs.c).detach(), (beta * pairs.r).detach()


def reduce_losses(losses: Tensor, reduction: str) -> Tensor:
    """The mean (0 for no pairs), the sum, or the losses themselves ("none")."""
    if reduction == "none":
        return losses
    if reduction == "sum" or losses.shape[0] == 0:
        return losses.sum()
    return losses.mean()


def join_reference(
    chosen: Tensor | None,
    rejected: Tensor | None,
    options: LossOptions,
    logits: Tensor,
    pairs: int,
    other: str = "",
) -> Tensor | None:
    """The reference's [2P] log-probs without gradient; None where none are given or needed.

    ``logits``: what the results take dtype and device from; ``other``: the argument that could be
    given instead.
    """
    if chosen is None and rejected is None:
        if needs_reference(options):
            instead = f" (or {other})" if other else ""
            raise ValueError(
                f"{', '.join(_NAMES)}: both are needed{instead} unless reference_free=True or the "
                "loss has no reference"
            )
        return None
    if chosen is None or rejected is None or options.reference_free:
        raise ValueError(
            f"{', '.join(_NAMES)}: expected both, or neither with reference_free=True; "
            f"got reference_free={options.reference_free}"
        )
    check_sequence_logps(_NAMES[0], chosen, pairs, logits.device)
    check_sequence_logps(_NAMES[1], rejected, pairs, logits.device)
    dtype = accumulation_dtype(logits.dtype)
    joined = torch.cat((chosen.detach(), rejected.detach()))
    return joined if joined.dtype == dtype else joined.to(dtype)


def refuse_two_references(
    name: str, chosen: Tensor | None, rejected: Tensor | None, options: LossOptions
) -> None:
    """For reference logits or hidden states, the argument ``name``."""
    if chosen is not None or rejected is not None:
        raise ValueError(f"{name}: given beside reference log-probs; expected one of them")
    if options.reference_free:
        raise ValueError(f"{name}: given with reference_free=True, which takes no reference")
