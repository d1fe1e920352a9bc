"""Every preference loss and f-divergence, once, as pure functions of sequence log-probs.

Notation, per pair: ``c`` and ``r`` are the policy-minus-reference log-ratios of the chosen and the
rejected answer, ``s`` the score function of the f-divergence (``s(x) = x`` for reverse KL),
``D = s(c) - s(r)``, ``b = beta``, ``e = label_smoothing``, ``n`` the number of scored tokens and
``ls`` the logarithm of the sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    check_choice,
    check_finite,
    check_flag,
    check_loss_type,
    check_loss_weights,
    check_number,
    check_positive,
)


@dataclass(frozen=True)
class LossOptions:
    """Everything about the loss that is not a tensor; validated when it is made.

    Raises ValueError for an option out of range, or one that no chosen loss takes.
    """

    beta: float = 0.1
    loss_type: str | tuple[str, ...] | Callable[[Tensor, Tensor], Tensor] = "sigmoid"
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    reference_free: bool = False
    f_divergence: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5

    def __post_init__(self):
        _check_options(self)

    @property
    def mix(self) -> tuple[tuple[str | Callable, float], ...]:
        """The losses to add up, each with its weight."""
        types = self.loss_type if isinstance(self.loss_type, tuple) else (self.loss_type,)
        weights = self.loss_weights or (1.0,) * len(types)
        return tuple(zip(types, weights, strict=True))

    @property
    def is_plain_sigmoid(self) -> bool:
        """Whether this is the loss that the kernels make inside their forward launch."""
        return self.mix == (("sigmoid", 1.0),) and self.f_divergence == "reverse_kl"

    @property
    def needs_reference(self) -> bool:
        """Whether some loss of the mix compares with a reference model."""
        return not self.reference_free and any(
            callable(name) or LOSSES[name].reference for name, _ in self.mix
        )

    @property
    def takes_lengths(self) -> bool:
        """Whether some loss of the mix divides by numbers of scored tokens."""
        return any(not callable(name) and LOSSES[name].lengths for name, _ in self.mix)

    @property
    def sorts_pairs(self) -> bool:
        """Whether the gradient of a pair depends on the other pairs of the batch."""
        return any(not callable(name) and LOSSES[name].couples_pairs for name, _ in self.mix)


@dataclass(frozen=True)
class PairLogps:
    """The four log-probs of every pair, [P] each, as the losses see them.

    ``lengths`` are the numbers of scored tokens, None where the log-probs are means already.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None
    options: LossOptions

    @property
    def c(self) -> Tensor:
        return self.policy_chosen - self.reference_chosen

    @property
    def r(self) -> Tensor:
        return self.policy_rejected - self.reference_rejected

    @property
    def scores(self) -> tuple[Tensor, Tensor]:
        """``(s(c), s(r))``."""
        score = F_DIVERGENCES[self.options.f_divergence]
        coef = self.options.f_alpha_divergence_coef
        return score(self.c, coef), score(self.r, coef)

    @property
    def logits(self) -> Tensor:
        """``b D``, the Bradley-Terry logit of the pair."""
        chosen, rejected = self.scores
        return self.options.beta * (chosen - rejected)

    def per_token(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """Divides by the numbers of scored tokens; what has none scores 0 and stays 0."""
        if self.chosen_lengths is None:
            return chosen, rejected
        return chosen / self.chosen_lengths.clamp(min=1), rejected / self.rejected_lengths.clamp(
            min=1
        )


# score functions s(x) = f'(e^x), up to a constant, of f-DPO (arXiv:2309.16240, table 1)


def reverse_kl(x: Tensor, coef: float) -> Tensor:
    """``x``: plain DPO."""
    return x


def forward_kl(x: Tensor, coef: float) -> Tensor:
    """``1 - exp(-x)``, the exponent held below 80."""
    # exp overflows beyond 88 nats, and inf times the loss's slope of 0 is not a number
    return -torch.expm1((-x).clamp(max=80.0))


def js_divergence(x: Tensor, coef: float) -> Tensor:
    """``log 2 + ls(x)``."""
    return math.log(2) + F.logsigmoid(x)


def alpha_divergence(x: Tensor, coef: float) -> Tensor:
    """``(exp((a - 1) x) - 1) / (a - 1)``, the exponent held below 80; reverse KL at ``a = 1``."""
    if abs(coef - 1) < 1e-6:
        return x
    return torch.expm1((x * (coef - 1)).clamp(max=80.0)) / (coef - 1)


F_DIVERGENCES = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    losses = -(1 - label_smoothing) * F.logsigmoid(logits)
    # 0 * inf where the rejected answer has no chance is not 0
    return losses - label_smoothing * F.logsigmoid(-logits) if label_smoothing else losses


def sigmoid(x: PairLogps) -> Tensor:
    """``-(1-e) ls(bD) - e ls(-bD)``: DPO (arXiv:2305.18290, eq. 7), smoothed as in cDPO."""
    return _smoothed(x.logits, x.options.label_smoothing)


def sigmoid_norm(x: PairLogps) -> Tensor:
    """``-ls(b (s(c)/n_w - s(r)/n_l))``: length-normalised DPO (as in Tulu 3, arXiv:2411.15124)."""
    chosen, rejected = x.per_token(*x.scores)
    return -F.logsigmoid(x.options.beta * (chosen - rejected))


def hinge(x: PairLogps) -> Tensor:
    """``max(0, 1 - bD)``: the hinge of SLiC (arXiv:2305.10425) on log-ratios."""
    return torch.relu(1 - x.logits)


def ipo(x: PairLogps) -> Tensor:
    """``(s(c)/n_w - s(r)/n_l - 1/(2b))^2`` (arXiv:2310.12036, eq. 17), per scored token."""
    chosen, rejected = x.per_token(*x.scores)
    return (chosen - rejected - 1 / (2 * x.options.beta)) ** 2


def exo_pair(x: PairLogps) -> Tensor:
    """``q (log q - log(1-e)) + q' (log q' - log e)`` with ``q = sigmoid(bD) = 1 - q'``.

    EXO, arXiv:2402.00856, eq. 16.
    """
    logits, smoothing = x.logits, x.options.label_smoothing
    chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-smoothing))
    rejected = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(smoothing))
    return chosen + rejected


def nca_pair(x: PairLogps) -> Tensor:
    """``-ls(bc) - ls(-bc)/2 - ls(-br)/2`` (arXiv:2402.05369, with two answers)."""
    chosen, rejected = x.options.beta * x.c, x.options.beta * x.r
    return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2


def robust(x: PairLogps) -> Tensor:
    """``[-(1-e) ls(bD) + e ls(-bD)] / (1-2e)``: unbiased by flipped labels (arXiv:2403.00409)."""
    logits, smoothing = x.logits, x.options.label_smoothing
    if not smoothing:
        return _smoothed(logits, 0.0)
    flipped = smoothing * F.logsigmoid(-logits)
    return (flipped - (1 - smoothing) * F.logsigmoid(logits)) / (1 - 2 * smoothing)


def bco_pair(x: PairLogps) -> Tensor:
    """``-ls(bc) - ls(-br)``: BCO without its running reward shift (arXiv:2404.04656)."""
    return -F.logsigmoid(x.options.beta * x.c) - F.logsigmoid(-x.options.beta * x.r)


def sppo_hard(x: PairLogps) -> Tensor:
    """``(c - 1/(2b))^2 + (r + 1/(2b))^2`` (arXiv:2405.00675, eq. 4.7, wins taken as certain)."""
    half = 0.5 / x.options.beta
    return (x.c - half) ** 2 + (x.r + half) ** 2


def aot(x: PairLogps) -> Tensor:
    """Smoothed sigmoid of b (sort(logp_w - logp_l) - sort(ref_w - ref_l)) (arXiv:2406.05882)."""
    policy = (x.policy_chosen - x.policy_rejected).sort(dim=0).values
    reference = (x.reference_chosen - x.reference_rejected).sort(dim=0).values
    return _smoothed(x.options.beta * (policy - reference), x.options.label_smoothing)


def aot_unpaired(x: PairLogps) -> Tensor:
    """Smoothed sigmoid of b (sort(c) - sort(r)) (arXiv:2406.05882)."""
    gap = x.c.sort(dim=0).values - x.r.sort(dim=0).values
    return _smoothed(x.options.beta * gap, x.options.label_smoothing)


def apo_zero(x: PairLogps) -> Tensor:
    """``1 - sigmoid(bc) + sigmoid(br)`` (arXiv:2408.06266, eq. 7)."""
    return torch.sigmoid(-x.options.beta * x.c) + torch.sigmoid(x.options.beta * x.r)


def apo_down(x: PairLogps) -> Tensor:
    """``sigmoid(bc) + 1 - sigmoid(b (c - r))`` (arXiv:2408.06266, eq. 8)."""
    return torch.sigmoid(x.options.beta * x.c) + torch.sigmoid(-x.options.beta * (x.c - x.r))


def discopop(x: PairLogps) -> Tensor:
    """``-(1-m) ls(y) + m exp(-y)``, ``m = sigmoid(y / tau)``, y = bD (arXiv:2406.08414, eq. 5)."""
    logits = x.logits
    scaled = logits / x.options.discopop_tau
    # one exponent for m exp(-y): exp(-y) alone overflows where m is 0
    exponential = torch.exp(F.logsigmoid(scaled) - logits)
    return exponential - torch.sigmoid(-scaled) * F.logsigmoid(logits)


def sft(x: PairLogps) -> Tensor:
    """Minus the mean log-prob over the batch's chosen scored tokens, the same for every pair."""
    if x.chosen_lengths is None:
        return -x.policy_chosen
    return (-x.policy_chosen.sum() / x.chosen_lengths.sum().clamp(min=1)).expand_as(x.policy_chosen)


def simpo(x: PairLogps) -> Tensor:
    """``-ls(b (logp_w/n_w - logp_l/n_l) - gamma)``: no reference (arXiv:2405.14734, eq. 6)."""
    chosen, rejected = x.per_token(x.policy_chosen, x.policy_rejected)
    return -F.logsigmoid(x.options.beta * (chosen - rejected) - x.options.simpo_gamma)


@dataclass(frozen=True)
class Loss:
    """A loss function and which options mean something to it."""

    function: Callable[[PairLogps], Tensor]
    label_smoothing: bool = False
    f_divergence: bool = False
    lengths: bool = False
    reference: bool = True
    # a pair's gradient depends on the other pairs
    couples_pairs: bool = False


LOSSES = {
    "sigmoid": Loss(sigmoid, label_smoothing=True, f_divergence=True),
    "sigmoid_norm": Loss(sigmoid_norm, f_divergence=True, lengths=True),
    "hinge": Loss(hinge, f_divergence=True),
    "ipo": Loss(ipo, f_divergence=True, lengths=True),
    "exo_pair": Loss(exo_pair, label_smoothing=True, f_divergence=True),
    "nca_pair": Loss(nca_pair),
    "robust": Loss(robust, label_smoothing=True, f_divergence=True),
    "bco_pair": Loss(bco_pair),
    "sppo_hard": Loss(sppo_hard),
    "aot": Loss(aot, label_smoothing=True, couples_pairs=True),
    "aot_unpaired": Loss(aot_unpaired, label_smoothing=True, couples_pairs=True),
    "apo_zero": Loss(apo_zero),
    "apo_down": Loss(apo_down),
    "discopop": Loss(discopop, f_divergence=True),
    "sft": Loss(sft, lengths=True, reference=False),
    "simpo": Loss(simpo, lengths=True, reference=False),
}


def pair_losses(x: PairLogps) -> Tensor:
    """The weighted sum of the losses of ``x.options``, one value a pair."""
    total = None
    for name, weight in x.options.mix:
        losses = _call_user_loss(name, x) if callable(name) else LOSSES[name].function(x)
        losses = losses if weight == 1.0 else losses * weight
        total = losses if total is None else total + losses
    return total


def _call_user_loss(function: Callable, x: PairLogps) -> Tensor:
    losses = function(x.c, x.r)
    if not isinstance(losses, Tensor) or losses.shape != x.policy_chosen.shape:
        raise ValueError(
            "loss_type: the callable must return a tensor of one loss a pair, "
            f"{list(x.policy_chosen.shape)}, got "
            f"{list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__}"
        )
    if x.c.requires_grad and not losses.requires_grad:
        raise ValueError(
            "loss_type: the losses of the callable have no gradient; they must be computed from "
            "the log-ratios it is given, without detach() or no_grad()"
        )
    return losses


def make_options(
    *,
    beta: float,
    loss_type: str | Sequence[str] | Callable,
    loss_weights: Sequence[float] | None = None,
    f_divergence: str = "reverse_kl",
    **rest,
) -> LossOptions:
    """LossOptions from what users pass: lists become tuples, "alpha" is "alpha_divergence"."""
    return LossOptions(
        beta=beta,
        loss_type=check_loss_type(loss_type),
        loss_weights=check_loss_weights(loss_weights),
        f_divergence="alpha_divergence" if f_divergence == "alpha" else f_divergence,
        **rest,
    )


_NUMBERS = {
    "beta": check_positive,
    "label_smoothing": check_number,
    "f_alpha_divergence_coef": check_finite,
    "discopop_tau": check_positive,
    "simpo_gamma": check_finite,
}


def _check_options(o: LossOptions) -> None:
    types = o.loss_type if isinstance(o.loss_type, tuple) else (o.loss_type,)
    if not types:
        raise ValueError(
            "loss_type: expected a loss or a non-empty list of losses, got an empty list"
        )
    for name in types:
        if not callable(name) and name not in LOSSES:
            raise ValueError(f"loss_type: {name!r} is not one of {', '.join(LOSSES)} or a callable")
    if o.loss_weights is not None and len(o.loss_weights) != len(types):
        raise ValueError(
            f"loss_weights: expected one for each of {len(types)} losses, got {len(o.loss_weights)}"
        )
    for name, check in _NUMBERS.items():
        object.__setattr__(o, name, check(name, getattr(o, name)))
    object.__setattr__(o, "reference_free", check_flag("reference_free", o.reference_free))
    check_choice("f_divergence", o.f_divergence, F_DIVERGENCES)
    if not 0 <= o.label_smoothing < 1:
        raise ValueError(
            f"label_smoothing: expected 0 <= label_smoothing < 1, got {o.label_smoothing}"
        )
    known = [LOSSES[name] for name in types if not callable(name)]
    label = " + ".join(getattr(name, "__name__", None) or str(name) for name in types)
    if o.label_smoothing and not any(loss.label_smoothing for loss in known):
        raise ValueError(
            f"label_smoothing: loss_type {label!r} does not take it, got {o.label_smoothing}"
        )
    if o.f_divergence != "reverse_kl" and not any(loss.f_divergence for loss in known):
        raise ValueError(
            f"f_divergence: loss_type {label!r} does not take it, got {o.f_divergence!r}"
        )
    for name, taken in (
        ("f_alpha_divergence_coef", o.f_divergence == "alpha_divergence"),
        ("discopop_tau", "discopop" in types),
        ("simpo_gamma", "simpo" in types),
    ):
        if not taken and getattr(o, name) != getattr(LossOptions, name):
            raise ValueError(
                f"{name}: loss_type {label!r} with f_divergence {o.f_divergence!r} does not take "
                f"it, got {getattr(o, name)}"
            )
    if "robust" in types and not o.label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing: 'robust' needs label_smoothing < 0.5, got {o.label_smoothing}"
        )
    if "exo_pair" in types and not o.label_smoothing > 0:
        raise ValueError(
            "label_smoothing: 'exo_pair' needs label_smoothing > 0 (1e-3 is usual), got 0"
        )
