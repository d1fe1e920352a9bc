"""The public functions in plain PyTorch: the truth to check against the papers, the baseline of
the benchmarks, and what runs where no kernel does.

Arithmetic is float32, or float64 for float64 input. Autograd makes the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_dense, check_lengths, check_pair_tensor
from .losses import LossOptions, PairLogps, make_options, pair_losses
from .types import DPOOutput, TokenStats


def scored_labels(
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """``labels`` with ``ignore_index`` wherever no row of logits scores the token.

    With ``shift`` that is the first token of every sequence; packed, also what lies outside them.
    """
    position = torch.arange(labels.shape[-1], device=labels.device)
    if cu_seqlens is None:
        has_row = position >= int(shift)
    else:
        has_row = _membership(cu_seqlens, labels.shape[-1], skip=int(shift)).any(0)
    return torch.where(has_row, labels, ignore_index)


def transform_logits(
    logits: Tensor, *, scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0
) -> Tensor:
    """``softcap * tanh(scale * logits / softcap) / temperature`` in float32 or float64."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if scale != 1.0:
        z = z * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z if temperature == 1.0 else z / temperature


def _rows(logits: Tensor, labels: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    return (logits[..., :-1, :], labels[..., 1:]) if shift else (logits, labels)


def _like_labels(values: Tensor, shift: bool, length: int) -> Tensor:
    # without tokens there is no first one to pad for
    return F.pad(values, (1, 0))[..., :length] if shift else values


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = False,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """``log softmax(z)[label]`` for every token, shaped like labels, 0 where nothing is scored."""
    length = labels.shape[-1]
    labels = scored_labels(labels, ignore_index=ignore_index, shift=shift, cu_seqlens=cu_seqlens)
    logits, labels = _rows(logits, labels, shift)
    scored = labels != ignore_index
    z = transform_logits(logits, scale=scale, softcap=softcap, temperature=temperature)
    picked = z.log_softmax(-1).gather(-1, labels.where(scored, 0).unsqueeze(-1)).squeeze(-1)
    return _like_labels(picked.where(scored, 0.0), shift, length)


def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = False,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> TokenStats:
    """token_logps and, without gradient, the other values of TokenStats."""
    logps = token_logps(
        logits,
        labels,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        cu_seqlens=cu_seqlens,
        scale=scale,
        softcap=softcap,
    )
    with torch.no_grad():
        labels = scored_labels(
            labels, ignore_index=ignore_index, shift=shift, cu_seqlens=cu_seqlens
        )
        logits, labels = _rows(logits, labels, shift)
        scored = labels != ignore_index
        z = transform_logits(logits, scale=scale, softcap=softcap, temperature=temperature)
        log_p = z.log_softmax(-1)
        stats = (
            torch.special.entr(log_p.exp()).sum(-1),
            z.mean(-1),
            (2 * log_p).logsumexp(-1),
        )
        entropy, mean_logits, log_sum_sq_probs = (
            _like_labels(value.where(scored, 0.0), shift, logps.shape[-1]) for value in stats
        )
        is_top1 = _like_labels((z.argmax(-1) == labels) & scored, shift, logps.shape[-1])
    return TokenStats(logps, entropy, mean_logits, is_top1, log_sum_sq_probs)


def sums_per_sequence(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sums over the tokens of each sequence: [S, T] or packed [N] to [S]."""
    if cu_seqlens is None:
        return values.sum(-1)
    # a where, not a product: another sequence's NaN stays its own
    return torch.where(_membership(cu_seqlens, values.shape[0]), values, 0).sum(-1)


def _membership(cu_seqlens: Tensor, num_tokens: int, skip: int = 0) -> Tensor:
    """[S, N]: whether packed token n lies in sequence s, after its first ``skip`` tokens."""
    position = torch.arange(num_tokens, device=cu_seqlens.device)
    return (position >= cu_seqlens[:-1, None] + skip) & (position < cu_seqlens[1:, None])


def sequence_lengths(
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The number of scored tokens of every sequence, [S]."""
    labels = scored_labels(labels, ignore_index=ignore_index, shift=shift, cu_seqlens=cu_seqlens)
    return sums_per_sequence(labels != ignore_index, cu_seqlens)


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    average_log_prob: bool = False,
    ignore_index: int = -100,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The sum of token_logps over each sequence, or its mean over the scored tokens; [S]."""
    logps = token_logps(
        logits,
        labels,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        cu_seqlens=cu_seqlens,
        scale=scale,
        softcap=softcap,
    )
    sums = sums_per_sequence(logps, cu_seqlens)
    if not average_log_prob:
        return sums
    lengths = sequence_lengths(
        labels, ignore_index=ignore_index, shift=shift, cu_seqlens=cu_seqlens
    )
    return sums / lengths.clamp(min=1)


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] | Callable = "sigmoid",
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
        loss_type: a name of losses.LOSSES, a list of names with ``loss_weights``, or a callable of
            (chosen_logratios, rejected_logratios) that returns ``[P]`` losses.
        label_smoothing: probability of a flipped label; for sigmoid (cDPO), robust, exo_pair, aot.
        reference_free: takes the reference log-probs as 0.
        f_divergence: reverse_kl, forward_kl, js_divergence or alpha_divergence.
        chosen_lengths, rejected_lengths: ``[P]`` numbers of scored tokens, for ipo, sigmoid_norm,
            simpo and sft; None where the log-probs are means over the tokens already.

    Returns:
        ``(losses, chosen_rewards, rejected_rewards)``, ``[P]`` each; the rewards ``beta * c`` and
        ``beta * r`` are detached.

    Raises:
        ValueError, TypeError: for shapes that differ, or an option that the loss does not take.
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
    policy = (policy_chosen_logps, policy_rejected_logps)
    reference = (reference_chosen_logps, reference_rejected_logps)
    lengths = (chosen_lengths, rejected_lengths)
    return preference_loss_from(policy, reference, lengths, options)


def preference_loss_from(
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor | None, Tensor | None],
    lengths: tuple[Tensor | None, Tensor | None],
    options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """preference_loss with its options made; each tuple is (chosen, rejected)."""
    _check_pair_tensors(policy, reference, lengths, options)
    chosen, rejected = (x if x.dtype == torch.float64 else x.float() for x in policy)
    if reference[0] is not None:
        reference = tuple(x if x.dtype == torch.float64 else x.float() for x in reference)
    else:
        reference = (torch.zeros_like(chosen, requires_grad=False),) * 2
    pairs = PairLogps(chosen, rejected, *reference, *lengths, options)
    losses = pair_losses(pairs)
    return losses, (options.beta * pairs.c).detach(), (options.beta * pairs.r).detach()


def _check_pair_tensors(policy, reference, lengths, options: LossOptions) -> None:
    names = ("policy_chosen_logps", "policy_rejected_logps")
    check_dense(names[0], policy[0])
    shape = policy[0].shape
    for name, x in zip(names, policy, strict=True):
        check_pair_tensor(name, x, shape)
    given = [x is not None for x in reference]
    if options.needs_reference and not all(given):
        raise ValueError(
            "reference_chosen_logps, reference_rejected_logps: both are needed unless "
            "reference_free=True or the loss has no reference"
        )
    if any(given) and (options.reference_free or not all(given)):
        raise ValueError(
            "reference_chosen_logps, reference_rejected_logps: expected both, or neither with "
            f"reference_free=True; got reference_free={options.reference_free}"
        )
    for side, log_probs, length in zip(("chosen", "rejected"), reference, lengths, strict=True):
        if log_probs is not None:
            check_pair_tensor(f"reference_{side}_logps", log_probs, shape)
        if length is not None:
            check_lengths(f"{side}_lengths", length, shape)
    if (lengths[0] is None) != (lengths[1] is None):
        raise ValueError("chosen_lengths, rejected_lengths: expected both or neither")
    if lengths[0] is not None and not options.takes_lengths:
        raise ValueError(f"chosen_lengths: loss_type {options.loss_type!r} does not take lengths")


def token_weights(
    labels: Tensor,
    *,
    ld_alpha: float,
    ignore_index: int = -100,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """LD-DPO (arXiv:2409.06411): 1 up to ``min(n_w, n_l)`` scored tokens, ``ld_alpha`` beyond.

    Shaped like labels; what it holds at tokens that are not scored does not matter.
    """
    labels = scored_labels(labels, ignore_index=ignore_index, shift=shift, cu_seqlens=cu_seqlens)
    scored = labels != ignore_index
    lengths = sums_per_sequence(scored, cu_seqlens)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    if cu_seqlens is None:
        beyond = scored.cumsum(-1) > shared.unsqueeze(-1)
    else:
        inside = scored & _membership(cu_seqlens, labels.shape[0])
        beyond = (inside & (inside.cumsum(-1) > shared.unsqueeze(-1))).any(0)
    return torch.where(beyond, ld_alpha, 1.0)


def wpo_weights(sums: Tensor, lengths: Tensor) -> Tensor:
    """WPO (arXiv:2406.11827, eq. 2): ``w_w w_l`` a pair, ``w = exp(mean(logp - log sum p^2))``.

    ``sums`` [2P] are those of ``logps - log_sum_sq_probs`` over the scored tokens.
    """
    chosen, rejected = (sums / lengths.clamp(min=1)).chunk(2)
    return (chosen + rejected).exp()


def dpo_loss(
    policy_logits: Tensor,
    labels: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    reference_logits: Tensor | None = None,
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
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    **loss_kwargs,
) -> DPOOutput:
    """The DPO loss of a batch of logits, as a trainer would write it; see functional.dpo_loss."""
    options = make_options(
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        reference_free=reference_free,
        **loss_kwargs,
    )
    rows = {"ignore_index": ignore_index, "shift": shift, "cu_seqlens": cu_seqlens}
    scoring = {**rows, "temperature": temperature, "scale": logit_scale, "softcap": logit_softcap}
    lengths = sequence_lengths(labels, **rows)

    def logps_of(logits: Tensor) -> Tensor:
        tokens = token_logps(logits, labels, **scoring)
        if ld_alpha is not None:
            tokens = tokens * token_weights(labels, ld_alpha=ld_alpha, **rows)
        sums = sums_per_sequence(tokens, cu_seqlens)
        return sums / lengths.clamp(min=1) if average_log_prob else sums

    weights = None
    if use_weighting:
        with torch.no_grad():
            stats = token_stats(policy_logits, labels, **scoring)
            aligned = stats.logps - stats.log_sum_sq_probs
            weights = wpo_weights(sums_per_sequence(aligned, cu_seqlens), lengths)
    reference = (reference_chosen_logps, reference_rejected_logps)
    if reference_logits is not None:
        with torch.no_grad():
            reference = logps_of(reference_logits).chunk(2)
    return pair_output(
        logps_of(policy_logits).chunk(2),
        reference,
        None if average_log_prob else lengths.chunk(2),
        options,
        reduction,
        weights,
    )


def pair_output(
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor | None, Tensor | None],
    lengths: tuple[Tensor, Tensor] | None,
    options: LossOptions,
    reduction: str,
    weights: Tensor | None = None,
) -> DPOOutput:
    """DPOOutput from sequence log-probs; ``lengths`` reach the losses that take them."""
    lengths = lengths if lengths is not None and options.takes_lengths else (None, None)
    losses, chosen_rewards, rejected_rewards = preference_loss_from(
        policy, reference, lengths, options
    )
    if weights is not None:
        losses = losses * weights
    return DPOOutput(
        loss=reduce(losses, reduction),
        losses=losses.detach(),
        chosen_logps=policy[0].detach(),
        rejected_logps=policy[1].detach(),
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
    )


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """The mean (0 for no pairs), the sum, or the losses themselves ("none")."""
    if reduction == "none":
        return losses
    if reduction == "sum" or losses.shape[0] == 0:
        return losses.sum()
    return losses.mean()


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """``hidden @ weight.T + bias``."""
    return F.linear(hidden, weight, bias)


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    **options,
) -> Tensor:
    """token_logps of ``hidden @ weight.T + bias``, the logits held whole."""
    logits = linear_logits(hidden, weight, bias=bias)
    return token_logps(logits, labels, scale=logit_scale, softcap=logit_softcap, **options)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    **options,
) -> TokenStats:
    """token_stats of ``hidden @ weight.T + bias``."""
    logits = linear_logits(hidden, weight, bias=bias)
    return token_stats(logits, labels, scale=logit_scale, softcap=logit_softcap, **options)


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    **options,
) -> Tensor:
    """sequence_logps of ``hidden @ weight.T + bias``."""
    logits = linear_logits(hidden, weight, bias=bias)
    return sequence_logps(logits, labels, scale=logit_scale, softcap=logit_softcap, **options)


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
    **options,
) -> DPOOutput:
    """dpo_loss of ``hidden @ weight.T + bias``; the reference's head defaults to the policy's."""
    reference_logits = None
    if reference_hidden is not None:
        with torch.no_grad():
            head = (
                (weight, bias) if reference_weight is None else (reference_weight, reference_bias)
            )
            reference_logits = linear_logits(reference_hidden, head[0], bias=head[1])
    return dpo_loss(
        linear_logits(hidden, weight, bias=bias),
        labels,
        reference_chosen_logps,
        reference_rejected_logps,
        reference_logits=reference_logits,
        **options,
    )
