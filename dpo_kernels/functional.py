"""The public functions from logits: checks, then one autograd.Function, or pairs.py's pipeline.

Rows: ``labels == ignore_index`` is not scored; padded batches of P pairs are ``[2P, T, V]`` with
the chosen answers first, packed ones ``[N, V]`` with ``cu_seqlens [2P + 1]``; with ``shift`` the
logits at t score the label at t + 1 of the same sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .autograd import SigmoidDPO
from .checks import (
    check_flag,
    check_lengths,
    check_local,
    check_padded_or_packed,
    check_pairs,
    check_sequence_logps,
)
from .compat import in_profiles, varies
from .losses import LossType, make_options, pair_losses, takes_lengths
from .pairs import (
    compose,
    is_made_by_kernels,
    join_reference,
    make_pairs,
    refuse_two_references,
    rewards_of,
)
from .parallel.agreement import check_same_loss
from .parallel.groups import ALONE
from .source import Logits, call_options
from .types import DPOOutput, LossOptions, TokenStats, accumulation_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@in_profiles
def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = False,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    backend: str | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
) -> Tensor:
    """``log softmax(logits / temperature)[label]`` for every token.

    Args:
        logits: ``[..., T, V]`` float32, bfloat16, float16, or float64 (CPU); any strides but the
            last, which is copied away if it is not 1.
        labels: ``[..., T]`` integers; ``ignore_index`` where nothing is scored.
        shift: the logits at t score the label at t + 1, and the first label is not scored. Off by
            default in the functions of tokens, on in those of sequences and pairs.
        temperature: divides the logits.
        inplace_backward: backward overwrites the logits with their gradient. Nothing else may need
            the logits afterwards, and a second backward raises. Logits that are a leaf are refused.
        backend: "cuda", "triton", "cpu" or "torch"; None chooses, DPO_KERNELS_BACKEND overrides.
        vocab_group: the ProcessGroup over which the vocabulary is split: the logits are this rank's
            columns, those behind the columns of the ranks before it. Labels count over the whole
            vocabulary and are the same on every rank, and so are the results, bit by bit; the
            gradient is that of this rank's columns. Costs an all-gather of 12 bytes a token and
            rank, and nothing in the backward. A DTensor that is sharded on its last dimension says
            its group itself, and gets its gradient as such a DTensor.
        sequence_group: the ProcessGroup over which the tokens of a sequence are split. Those of a
            slice need nothing of the others, so here it changes nothing; ``shift`` is refused with
            it, because a label may lie in the next slice.

    Returns:
        Log-probs in nats, shaped and aligned like ``labels``, 0 where nothing is scored; float32
        (float64 for float64 logits). The gradient has the dtype of the logits.

    Raises:
        ValueError: shapes that do not fit; on a CPU, a label outside ``[0, V)``, with its position.
            On a GPU such a row is NaN, and DPO_KERNELS_VALIDATE=1 raises.
        TypeError: dtypes that do not fit.
        BackendUnavailableError: a backend asked for by name cannot serve the call.
        RuntimeError: a collective that failed, with the name of its group. Ranks that were given
            different arguments raise with DPO_KERNELS_VALIDATE=1 and are undefined without.

    Under torch.compile a call with a group is a graph break.
    """
    options = call_options(
        ignore_index, shift, temperature, backend, vocab_group, sequence_group, inplace_backward
    )
    return Logits(logits, labels, None, options).tokens()[0].view(labels.shape)


@in_profiles
def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = False,
    temperature: float = 1.0,
    backend: str | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
) -> TokenStats:
    """token_logps with the entropy, mean logit, top-1 hit and ``log sum p^2`` from the same read.

    Arguments and errors are token_logps's; TokenStats says what each value is. Only ``logps``
    carries a gradient.
    """
    options = call_options(ignore_index, shift, temperature, backend, vocab_group, sequence_group)
    logps, values, is_top1 = Logits(logits, labels, None, options).tokens(stats=True)
    return TokenStats.of(logps.view(labels.shape), values, is_top1)


@in_profiles
def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    average_log_prob: bool = False,
    ignore_index: int = -100,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    backend: str | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
) -> Tensor:
    """``log pi(y|x) = sum_t log softmax(logits_t / temperature)[label_t]`` for every sequence.

    Args:
        logits: ``[S, T, V]``, or packed ``[N, V]`` with ``cu_seqlens``.
        labels: ``[S, T]`` or ``[N]``.
        average_log_prob: the mean over the scored tokens instead of the sum; 0 where there is none.
        cu_seqlens: ``[S + 1]`` int32 or int64, rising from 0 to N.
        ignore_index, shift, temperature, inplace_backward, backend, vocab_group: as in token_logps.
        sequence_group: the ProcessGroup over which the tokens of every sequence are split. The
            results are those of the whole sequences on every rank, by one all-gather of [2, S]; the
            gradient is that of this rank's slice. ``shift`` must be False: align the labels before
            they are cut.

    Returns:
        ``[S]`` float32 (float64 for float64 logits), in nats. The sum runs in a fixed order, so the
        same sequence gives the same bits in any batch.
    """
    options = call_options(
        ignore_index, shift, temperature, backend, vocab_group, sequence_group, inplace_backward
    )
    source = Logits(logits, labels, cu_seqlens, options)
    check_padded_or_packed("logits", source.logits, cu_seqlens)
    return source.sums(check_flag("average_log_prob", average_log_prob))


@in_profiles
def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    *,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    reference_free: bool = False,
    f_divergence: str = "reverse_kl",
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    loss_weights: Sequence[float] | None = None,
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of every pair from its four log-probs.

    ``sigmoid`` is DPO (arXiv:2305.18290, eq. 7): ``-log sigmoid(beta * (c - r))`` with
    ``c = policy_chosen_logps - reference_chosen_logps`` and ``r`` likewise; losses.py has the rest.

    Args:
        policy_chosen_logps, policy_rejected_logps: ``[P]``, in nats; bfloat16 and float16 are
            taken to float32.
        reference_chosen_logps, reference_rejected_logps: ``[P]``; None with ``reference_free=True``
            or a loss that has no reference (sft, simpo; if given they only make the rewards).
        beta: strength of the KL constraint, in 1 / nats.
        loss_type: "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust",
            "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop",
            "sft" or "simpo"; a list of names with ``loss_weights``; a dict of name to weight; or a
            callable of (chosen_logratios, rejected_logratios) that returns ``[P]`` losses.
        label_smoothing: probability of a flipped label; for sigmoid (cDPO), robust (below 0.5),
            aot, aot_unpaired, and exo_pair, where it has to be above 0, say 1e-3.
        reference_free: takes the reference log-probs as 0; none may be given then.
        f_divergence: reverse_kl, forward_kl, js_divergence or alpha_divergence.
        chosen_lengths, rejected_lengths: ``[P]`` numbers of scored tokens, for ipo, sigmoid_norm,
            simpo and sft; None where the log-probs are means over the tokens already.
        loss_weights: one number for each name of a list of losses; by default each counts once.
        f_alpha_divergence_coef: ``a`` of alpha_divergence.
        discopop_tau: temperature of discopop's mixing sigmoid.
        simpo_gamma: target margin of simpo.

    Returns:
        ``(losses, chosen_rewards, rejected_rewards)``, ``[P]`` each; the rewards ``beta * c`` and
        ``beta * r`` are detached.

    Raises:
        ValueError, TypeError: shapes that differ, or an option that the loss does not take. Options
            are plain numbers: a tensor is refused, because no path would give it a gradient.
    """
    options = make_options(
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
    logps = _join_policy(policy_chosen_logps, policy_rejected_logps)
    pairs = logps.shape[0] // 2
    reference = join_reference(
        reference_chosen_logps, reference_rejected_logps, options, logps, pairs
    )
    lengths = _join_lengths(chosen_lengths, rejected_lengths, options, logps)
    made = make_pairs(logps, reference, lengths, options)
    return pair_losses(made), *rewards_of(made)


def _join_policy(chosen: Any, rejected: Any) -> Tensor:
    """[2P] float32 or float64."""
    check_local("policy_chosen_logps", chosen)
    pairs, device = chosen.shape[0] if chosen.dim() else 0, chosen.device
    check_sequence_logps("policy_chosen_logps", chosen, pairs, device)
    check_sequence_logps("policy_rejected_logps", rejected, pairs, device)
    joined = torch.cat((chosen, rejected))
    return joined.to(accumulation_dtype(joined.dtype))


def _join_lengths(chosen: Any, rejected: Any, options: LossOptions, logps: Tensor) -> Tensor | None:
    if chosen is None and rejected is None:
        return None
    if chosen is None or rejected is None:
        raise ValueError("chosen_lengths, rejected_lengths: expected both or neither")
    for name, x in (("chosen_lengths", chosen), ("rejected_lengths", rejected)):
        check_lengths(name, x, logps.shape[0] // 2, logps.device)
    if not takes_lengths(options):
        names = " + ".join(str(name) for name in options.loss_types)
        raise ValueError(f"chosen_lengths: loss_type {names!r} does not take lengths")
    return torch.cat((chosen, rejected))


@in_profiles
def dpo_loss(
    policy_logits: Tensor,
    labels: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    reference_logits: Tensor | None = None,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    reference_free: bool = False,
    average_log_prob: bool = False,
    ignore_index: int = -100,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 1.0,
    inplace_backward: bool = False,
    backend: str | None = None,
    loss_weights: Sequence[float] | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
) -> DPOOutput:
    """The DPO loss of a batch of pairs (arXiv:2305.18290, eq. 7), from logits.

    ``loss = -log sigmoid(beta * [(log pi(w) - log ref(w)) - (log pi(l) - log ref(l))])``

    Args:
        policy_logits: ``[2P, T, V]``, row i the chosen and row P + i the rejected answer of pair i,
            or packed ``[N, V]`` with ``cu_seqlens [2P + 1]``.
        labels: ``[2P, T]`` or ``[N]``; ``ignore_index`` at prompt and padding.
        reference_chosen_logps, reference_rejected_logps: ``[P]``, in nats, without gradient.
        reference_logits: the reference's logits, instead of its log-probs; no gradient.
        beta, loss_type, label_smoothing, reference_free, loss_weights: as in preference_loss.
        f_divergence, f_alpha_divergence_coef, discopop_tau, simpo_gamma: as in preference_loss.
        average_log_prob: sequence log-probs are means over the scored tokens.
        reduction: "mean" over the pairs, "sum", or "none" for ``[P]`` losses.
        ld_alpha: weight of tokens beyond the shorter answer's length (LD-DPO, arXiv:2409.06411).
        use_weighting: weighs each pair by how likely the policy finds it (WPO, arXiv:2406.11827).
        ignore_index, shift, temperature, inplace_backward, backend, vocab_group: as in token_logps;
            reference_logits are split like the policy's.
        sequence_group: as in sequence_logps. Every rank returns the whole loss and the gradient of
            its own slice: sum the gradients of parameters over the group, and under an engine that
            takes their mean multiply the loss by the size of the group. LD-DPO costs an all-gather
            of [S] more, and needs the slices of a sequence in the order of the ranks.

    Returns:
        DPOOutput; an empty batch gives a differentiable 0.

    Raises:
        ValueError, TypeError, BackendUnavailableError: as in token_logps and preference_loss.
    """
    call = call_options(
        ignore_index, shift, temperature, backend, vocab_group, sequence_group, inplace_backward
    )
    options = make_options(
        beta=beta,
        loss_type=loss_type,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        reference_free=reference_free,
        f_divergence=f_divergence,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        discopop_tau=discopop_tau,
        simpo_gamma=simpo_gamma,
        average_log_prob=average_log_prob,
        ld_alpha=ld_alpha,
        use_weighting=use_weighting,
        reduction=reduction,
    )
    source = Logits(policy_logits, labels, cu_seqlens, call, "policy_logits")
    check_padded_or_packed("policy_logits", source.logits, cu_seqlens)
    check_pairs("policy_logits", source.layout)
    pairs = source.layout.num_seqs // 2
    if reference_logits is not None:
        refuse_two_references(
            "reference_logits", reference_chosen_logps, reference_rejected_logps, options
        )
        # only the policy's logits may be overwritten
        call = call._replace(inplace_backward=False)
        with torch.no_grad():
            other = Logits(reference_logits, labels, cu_seqlens, call, "reference_logits")
            reference_logps = other.sequence_logps(options)
            # the kernels read it as their own
            reference_logps = reference_logps.to(accumulation_dtype(source.logits.dtype))
    else:
        reference_logps = join_reference(
            reference_chosen_logps,
            reference_rejected_logps,
            options,
            source.logits,
            pairs,
            "reference_logits",
        )
    groups = source.options.groups
    if groups is not ALONE:
        check_same_loss(groups, options, reference_logps)
    fixed = not (varies(options.beta) or varies(options.label_smoothing))
    if is_made_by_kernels(options) and fixed and pairs and not any(groups):
        return _fused_sigmoid(source, reference_logps, options, pairs)
    return compose(source, reference_logps, options)[0]


def _fused_sigmoid(
    source: Logits, reference_logps: Tensor | None, options: LossOptions, pairs: int
) -> DPOOutput:
    layout = source.layout
    loss, losses, seqs = SigmoidDPO.apply(
        source.logits, layout.labels, layout.cu_seqlens, reference_logps, source.options, options
    )
    chosen, rejected, _, _, chosen_rewards, rejected_rewards = seqs.view(6, pairs).unbind(0)
    per_pair = options.reduction == "none"
    return DPOOutput(
        losses if per_pair else loss,
        losses.detach() if per_pair else losses,
        chosen,
        rejected,
        chosen_rewards,
        rejected_rewards,
    )
