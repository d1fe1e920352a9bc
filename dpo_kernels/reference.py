"""The oracle: the public functions in plain PyTorch, as the papers write them.

Nothing of the package uses it: it is what tests check against and benchmarks compare with, so it
shares no code with what it checks, and does not validate its arguments. Arithmetic is float32, or
float64 for float64 input. Autograd makes the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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


def _scored_rows(
    logits: Tensor, labels: Tensor, ignore_index: int, shift: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, labels, whether a label is scored), row by row."""
    labels = scored_labels(labels, ignore_index=ignore_index, shift=shift, cu_seqlens=cu_seqlens)
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    return logits, labels, labels != ignore_index


def _like_labels(values: Tensor, scored: Tensor, labels: Tensor) -> Tensor:
    values = values.where(scored, torch.zeros((), dtype=values.dtype, device=values.device))
    # without tokens there is no first one to pad for
    missing = min(labels.shape[-1], 1) if values.shape != labels.shape else 0
    return F.pad(values, (missing, 0))


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
    rows, targets, scored = _scored_rows(logits, labels, ignore_index, shift, cu_seqlens)
    z = transform_logits(rows, scale=scale, softcap=softcap, temperature=temperature)
    picked = z.log_softmax(-1).gather(-1, targets.where(scored, 0).unsqueeze(-1)).squeeze(-1)
    return _like_labels(picked, scored, labels)


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
    layout = {"ignore_index": ignore_index, "shift": shift, "cu_seqlens": cu_seqlens}
    transform = {"scale": scale, "softcap": softcap, "temperature": temperature}
    logps = token_logps(logits, labels, **layout, **transform)
    with torch.no_grad():
        rows, targets, scored = _scored_rows(logits, labels, **layout)
        z = transform_logits(rows, **transform)
        log_p = z.log_softmax(-1)
        stats = (
            torch.special.entr(log_p.exp()).sum(-1),
            z.mean(-1),
            z.argmax(-1) == targets,
            (2 * log_p).logsumexp(-1),
        )
        return TokenStats(logps, *(_like_labels(value, scored, labels) for value in stats))


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
    layout = {"ignore_index": ignore_index, "shift": shift, "cu_seqlens": cu_seqlens}
    transform = {"scale": scale, "softcap": softcap, "temperature": temperature}
    sums = sums_per_sequence(token_logps(logits, labels, **layout, **transform), cu_seqlens)
    return sums / sequence_lengths(labels, **layout).clamp(min=1) if average_log_prob else sums


def _score(x: Tensor, divergence: str, alpha: float) -> Tensor:
    """f-DPO (arXiv:2309.16240, table 1): f'(e^x) up to a constant."""
    if divergence == "forward_kl":
        return 1 - torch.exp(-x)
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(x)
    if divergence in ("alpha", "alpha_divergence") and alpha != 1:
        return (torch.exp((alpha - 1) * x) - 1) / (alpha - 1)
    return x


class _Pairs:
    """What the formulas use: log-probs, log-ratios, scores, numbers of tokens, options."""

    def __init__(self, w, l, ref_w, ref_l, n_w, n_l, divergence, alpha, **options):
        self.w, self.l, self.ref_w, self.ref_l, self.n_w, self.n_l = w, l, ref_w, ref_l, n_w, n_l
        self.b, self.e, self.tau, self.gamma = options.values()
        self.c, self.r = w - ref_w, l - ref_l
        self.s_c, self.s_r = (_score(x, divergence, alpha) for x in (self.c, self.r))
        self.x = self.b * (self.s_c - self.s_r)
        self.mean_gap = self.s_c / n_w - self.s_r / n_l


def _smoothed(x: Tensor, e: float) -> Tensor:
    # without smoothing the second term is 0 * inf where the rejected answer has no chance
    return -(1 - e) * F.logsigmoid(x) - (e * F.logsigmoid(-x) if e else 0)


def _exo_pair(p: _Pairs) -> Tensor:
    log_q, log_not_q = F.logsigmoid(p.x), F.logsigmoid(-p.x)
    chosen = log_q.exp() * (log_q - math.log(1 - p.e))
    return chosen + log_not_q.exp() * (log_not_q - math.log(p.e))


def _discopop(p: _Pairs) -> Tensor:
    m = torch.sigmoid(p.x / p.tau)
    return -(1 - m) * F.logsigmoid(p.x) + m * torch.exp(-p.x)


_FORMULAS: dict[str, Callable[[_Pairs], Tensor]] = {
    "sigmoid": lambda p: _smoothed(p.x, p.e),
    "sigmoid_norm": lambda p: -F.logsigmoid(p.b * p.mean_gap),
    "hinge": lambda p: torch.relu(1 - p.x),
    "ipo": lambda p: (p.mean_gap - 1 / (2 * p.b)) ** 2,
    "exo_pair": _exo_pair,
    "nca_pair": lambda p: (
        -F.logsigmoid(p.b * p.c) - (F.logsigmoid(-p.b * p.c) + F.logsigmoid(-p.b * p.r)) / 2
    ),
    "robust": lambda p: (
        (-(1 - p.e) * F.logsigmoid(p.x) + p.e * F.logsigmoid(-p.x)) / (1 - 2 * p.e)
    ),
    "bco_pair": lambda p: -F.logsigmoid(p.b * p.c) - F.logsigmoid(-p.b * p.r),
    "sppo_hard": lambda p: (p.c - 1 / (2 * p.b)) ** 2 + (p.r + 1 / (2 * p.b)) ** 2,
    "aot": lambda p: _smoothed(
        p.b * (torch.sort(p.w - p.l).values - torch.sort(p.ref_w - p.ref_l).values), p.e
    ),
    "aot_unpaired": lambda p: _smoothed(
        p.b * (torch.sort(p.c).values - torch.sort(p.r).values), p.e
    ),
    "apo_zero": lambda p: 1 - torch.sigmoid(p.b * p.c) + torch.sigmoid(p.b * p.r),
    "apo_down": lambda p: torch.sigmoid(p.b * p.c) + 1 - torch.sigmoid(p.b * (p.c - p.r)),
    "discopop": _discopop,
    "simpo": lambda p: -F.logsigmoid(p.b * (p.w / p.n_w - p.l / p.n_l) - p.gamma),
}


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] | Callable | dict[str, float] = "sigmoid",
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
    """``(losses, chosen_rewards, rejected_rewards)``, ``[P]`` each; see functional.preference_loss.

    Without lengths every answer counts as one token: the log-probs are means already.
    """
    given = (policy_chosen_logps, policy_rejected_logps)
    w, l = (x if x.dtype == torch.float64 else x.float() for x in given)
    ref_w, ref_l = reference_chosen_logps, reference_rejected_logps
    if ref_w is None or ref_l is None:
        ref_w = ref_l = torch.zeros_like(w)
    n_w, n_l = torch.ones_like(w), torch.ones_like(w)
    mean_of_all = w
    if chosen_lengths is not None and rejected_lengths is not None:
        n_w, n_l = chosen_lengths.clamp(min=1), rejected_lengths.clamp(min=1)
        mean_of_all = (w.sum() / chosen_lengths.sum().clamp(min=1)).expand_as(w)
    divergence = (f_divergence, f_alpha_divergence_coef)
    options = {"b": beta, "e": label_smoothing, "tau": discopop_tau, "gamma": simpo_gamma}
    pairs = _Pairs(w, l, ref_w.detach(), ref_l.detach(), n_w, n_l, *divergence, **options)
    if isinstance(loss_type, dict):
        loss_weights = list(loss_type.values())
    names = [loss_type] if isinstance(loss_type, str) or callable(loss_type) else list(loss_type)
    losses = torch.zeros_like(w)
    for name, weight in zip(names, loss_weights or [1.0] * len(names), strict=True):
        if callable(name):
            losses = losses + weight * name(pairs.c, pairs.r)
        elif name == "sft":
            losses = losses - weight * mean_of_all
        else:
            losses = losses + weight * _FORMULAS[name](pairs)
    return losses, (beta * pairs.c).detach(), (beta * pairs.r).detach()


def ld_dpo(
    tokens: Tensor,
    labels: Tensor,
    *,
    ld_alpha: float,
    ignore_index: int = -100,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """LD-DPO (arXiv:2409.06411): log-probs beyond ``min(n_w, n_l)`` tokens weigh ``ld_alpha``."""
    labels = scored_labels(labels, ignore_index=ignore_index, shift=shift, cu_seqlens=cu_seqlens)
    scored = labels != ignore_index
    lengths = sums_per_sequence(scored, cu_seqlens)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    if cu_seqlens is None:
        beyond = scored.cumsum(-1) > shared.unsqueeze(-1)
    else:
        inside = scored & _membership(cu_seqlens, labels.shape[0])
        beyond = (inside & (inside.cumsum(-1) > shared.unsqueeze(-1))).any(0)
    # a weight of 0 leaves nothing, not even of -inf
    return torch.where(beyond, ld_alpha * tokens if ld_alpha else torch.zeros_like(tokens), tokens)


def dpo_loss(
    policy_logits: Tensor,
    labels: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    reference_logits: Tensor | None = None,
    loss_type: str | Sequence[str] | Callable | dict[str, float] = "sigmoid",
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
    **loss_options,
) -> DPOOutput:
    """The DPO loss of a batch of logits, as a trainer would write it; see functional.dpo_loss."""
    rows = {"ignore_index": ignore_index, "shift": shift, "cu_seqlens": cu_seqlens}
    scoring = {**rows, "temperature": temperature, "scale": logit_scale, "softcap": logit_softcap}
    lengths = sequence_lengths(labels, **rows)

    def logps_of(logits: Tensor) -> tuple[Tensor, ...]:
        tokens = token_logps(logits, labels, **scoring)
        if ld_alpha is not None:
            tokens = ld_dpo(tokens, labels, ld_alpha=ld_alpha, **rows)
        sums = sums_per_sequence(tokens, cu_seqlens)
        return (sums / lengths.clamp(min=1) if average_log_prob else sums).chunk(2)

    policy = logps_of(policy_logits)
    reference = (reference_chosen_logps, reference_rejected_logps)
    if reference_logits is not None:
        with torch.no_grad():
            reference = logps_of(reference_logits)
    if not average_log_prob:
        loss_options |= dict(
            zip(("chosen_lengths", "rejected_lengths"), lengths.chunk(2), strict=True)
        )
    losses, chosen_rewards, rejected_rewards = preference_loss(
        *policy, *reference, loss_type=loss_type, **loss_options
    )
    if use_weighting:
        with torch.no_grad():
            stats = token_stats(policy_logits, labels, **scoring)
            # WPO (arXiv:2406.11827, eq. 2): w_w w_l a pair, w = exp(mean(logp - log sum p^2))
            sums = sums_per_sequence(stats.logps - stats.log_sum_sq_probs, cu_seqlens)
            weights = (sums / lengths.clamp(min=1)).exp().view(2, -1).prod(0)
        losses = losses * weights
    # without pairs 0, not the mean of nothing
    loss = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        loss = loss / max(losses.shape[0], 1)
    chosen, rejected = (x.detach() for x in policy)
    return DPOOutput(loss, losses.detach(), chosen, rejected, chosen_rewards, rejected_rewards)


def _from_hidden(function: Callable) -> Callable:
    """``function`` of the logits ``hidden @ weight.T + bias``, held whole."""

    def run(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        **options,
    ):
        logits = F.linear(hidden, weight, bias)
        return function(logits, labels, scale=logit_scale, softcap=logit_softcap, **options)

    return run


linear_token_logps = _from_hidden(token_logps)
linear_token_stats = _from_hidden(token_stats)
linear_sequence_logps = _from_hidden(sequence_logps)


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
    if reference_hidden is not None:
        head = (weight, bias) if reference_weight is None else (reference_weight, reference_bias)
        with torch.no_grad():
            options["reference_logits"] = F.linear(reference_hidden, *head)
    references = (reference_chosen_logps, reference_rejected_logps)
    return dpo_loss(F.linear(hidden, weight, bias), labels, *references, **options)
