"""linear_dpo_loss: hidden states to the DPO loss; linear.py says how many GEMMs it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import reference
from .checks import check_flag, check_ld_alpha, check_pairs, check_reduction
from .functional import join_reference, make_stats
from .head_passes import PairArguments
from .linear_autograd import LinearDPO
from .linear_call import HeadCall
from .linear_checks import check_head, check_hidden
from .losses import LossOptions, make_options
from .types import DPOOutput, TokenStats


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    precision: str = "exact",
    workspace_mb: float | None = None,
    beta: float = 0.1,
    loss_type: str | Sequence[str] | Callable = "sigmoid",
    label_smoothing: float = 0.0,
    reference_free: bool = False,
    average_log_prob: bool = False,
    ignore_index: int = -100,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 1.0,
    backend: str | None = None,
    loss_weights: Sequence[float] | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    return_stats: bool = False,
) -> DPOOutput | tuple[DPOOutput, TokenStats]:
    """dpo_loss of the logits ``hidden @ weight.T + bias``, which are never held whole.

    Args:
        hidden: ``[2P, T, D]`` of the model's last layer, row i the chosen and row P + i the
            rejected answer of pair i, or packed ``[N, D]`` with ``cu_seqlens [2P + 1]``.
        weight, bias, logit_scale, logit_softcap, precision, workspace_mb: as in linear_token_logps.
        reference_hidden: the reference model's hidden states, instead of its log-probs; they get
            no gradient.
        reference_weight, reference_bias: the reference's head; None: the policy's.
        return_stats: also return what trainers log of every token, from the same GEMMs.
        The others: as in dpo_loss.

    Returns:
        DPOOutput, or with ``return_stats`` ``(DPOOutput, TokenStats)``, the stats without
        gradient; an empty batch gives a differentiable 0.
    """
    call = HeadCall(
        hidden,
        weight,
        bias,
        labels,
        cu_seqlens,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        precision=precision,
        workspace_mb=workspace_mb,
        backend=backend,
    )
    check_reduction(reduction)
    loss_options = make_options(
        beta=beta,
        loss_type=loss_type,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        reference_free=reference_free,
        f_divergence=f_divergence,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        discopop_tau=discopop_tau,
        simpo_gamma=simpo_gamma,
    )
    num_seqs = hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_pairs(num_seqs, "hidden" if cu_seqlens is None else "cu_seqlens")
    reference_head = (None, None, None)
    reference_logps = None
    if reference_hidden is not None:
        if reference_chosen_logps is not None or reference_rejected_logps is not None:
            raise ValueError(
                "reference_hidden: given beside reference log-probs; expected one of them"
            )
        reference_head = _reference_head(
            hidden, reference_hidden, weight, bias, reference_weight, reference_bias
        )
    elif reference_weight is not None or reference_bias is not None:
        raise ValueError("reference_weight, reference_bias: given without reference_hidden")
    else:
        reference_logps = join_reference(
            reference_chosen_logps, reference_rejected_logps, loss_options, hidden, num_seqs // 2
        )
    ld_alpha = check_ld_alpha(ld_alpha)
    average = check_flag("average_log_prob", average_log_prob)
    use_weighting = check_flag("use_weighting", use_weighting)
    return_stats = check_flag("return_stats", return_stats)
    arguments = (loss_options, average, ld_alpha, use_weighting, reduction)
    couples = _couples_pairs(loss_options, use_weighting) or reduction == "none"
    if call.frozen_head or couples:
        output, *tokens = _composed(call, reference_logps, reference_head, return_stats, *arguments)
    else:
        output, *tokens = _fused(call, reference_logps, reference_head, return_stats, *arguments)
    if not return_stats:
        return output
    logps, values, is_top1 = tokens
    return output, make_stats(logps.detach().view(call.shape), values, is_top1)


def _couples_pairs(options: LossOptions, use_weighting: bool) -> bool:
    """Whether a pair's slopes may need the log-probs of other pairs."""
    names = [name for name, _ in options.mix]
    if any(callable(name) for name in names):
        # what a callable does with the batch is its own affair
        return True
    return options.sorts_pairs or (use_weighting and "sft" in names)


def _reference_head(hidden, reference_hidden, weight, bias, reference_weight, reference_bias):
    """(hidden, weight, bias) of the reference; the weight is None where it is the policy's."""
    check_hidden("reference_hidden", reference_hidden)
    if reference_hidden.shape[:-1] != hidden.shape[:-1] or reference_hidden.device != hidden.device:
        raise ValueError(
            f"reference_hidden: expected {list(hidden.shape[:-1])} rows on {hidden.device} like "
            f"hidden, got {list(reference_hidden.shape[:-1])} on {reference_hidden.device}"
        )
    if reference_weight is None:
        if reference_bias is not None:
            raise ValueError("reference_bias: given without reference_weight")
        check_head(reference_hidden, weight, bias, "reference_")
        return reference_hidden.detach(), None, None
    check_head(reference_hidden, reference_weight, reference_bias, "reference_")
    if reference_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"reference_weight: expected a vocabulary of {weight.shape[0]} like weight, "
            f"got {reference_weight.shape[0]}"
        )
    bias = None if reference_bias is None else reference_bias.detach()
    reference_hidden = reference_hidden.detach()
    if torch.float64 in (hidden.dtype, reference_hidden.dtype):
        # the results of a call are of one dtype
        reference_hidden = reference_hidden.to(hidden.dtype)
    return reference_hidden, reference_weight.detach(), bias


def _fused(
    call: HeadCall,
    reference_logps: Tensor | None,
    reference_head: tuple,
    stats: bool,
    *arguments,
) -> tuple[DPOOutput, Tensor, Tensor, Tensor]:
    """The gradients of the head in the same visit as its logits."""
    loss, losses, logps, chosen_rewards, rejected_rewards, *tokens = LinearDPO.apply(
        *call.head,
        call.layout.labels,
        call.layout.cu_seqlens,
        reference_logps,
        *reference_head,
        call.options,
        stats,
        PairArguments.of(*arguments),
        call.needs,
    )
    output = DPOOutput(loss, losses, *logps.chunk(2), chosen_rewards, rejected_rewards)
    return output, *tokens


def _composed(
    call: HeadCall,
    reference_logps: Tensor | None,
    reference_head: tuple,
    stats: bool,
    options: LossOptions,
    average: bool,
    ld_alpha: float | None,
    use_weighting: bool,
    reduction: str,
) -> tuple[DPOOutput, Tensor, Tensor, Tensor]:
    """Any loss on top of the token log-probs: autograd hands its slopes to their backward."""
    layout = call.layout
    if reference_head[0] is not None:
        head = (
            reference_head
            if reference_head[1] is not None
            else (
                reference_head[0],
                *call.head[1:],
            )
        )
        reference_logps = layout.sequence_logps(call.reference_tokens(head), average, ld_alpha)
    logps, values, is_top1 = call.tokens(stats=stats or use_weighting)
    weights = layout.wpo_weights(logps.detach() - values[2]) if use_weighting else None
    output = reference.pair_output(
        layout.sequence_logps(logps, average, ld_alpha).chunk(2),
        (None, None) if reference_logps is None else reference_logps.chunk(2),
        None if average else layout.lengths.chunk(2),
        options,
        reduction,
        weights,
    )
    return output, logps, values, is_top1
