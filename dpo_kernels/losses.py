"""Every preference loss and f-divergence, once, as pure functions of sequence log-probs.

Notation, per pair: ``c`` and ``r`` are the policy-minus-reference log-ratios of the chosen and the
rejected answer, ``s`` the score function of the f-divergence (``s(x) = x`` for reverse KL),
``D = s(c) - s(r)``, ``b = beta``, ``e = label_smoothing``, ``n`` the number of scored tokens and
``ls`` the logarithm of the sigmoid.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import saturating
from .checks import check_choice, check_finite, check_flag, check_number, check_positive
from .types import LossOptions

LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
LossType: TypeAlias = str | LossFunction | Sequence[str | LossFunction] | dict[str, float]
REDUCTIONS = ("mean", "sum", "none")
_F_ALPHA, _TAU, _GAMMA = 0.5, 0.05, 0.5


class PairLogps(NamedTuple):
    """The log-probs of every pair, [P] each, as the losses see them.

    ``c`` and ``r`` are log-ratios. ``lengths`` are the numbers of scored tokens, None where the
    log-probs are means already.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    c: Tensor
    r: Tensor
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None
    options: LossOptions

    def scores(self) -> tuple[Tensor, Tensor]:
        """``(s(c), s(r))``."""
        score = F_DIVERGENCES[self.options.f_divergence]
        coef = self.options.f_alpha_divergence_coef
        return score(self.c, coef), score(self.r, coef)

    def logits(self) -> Tensor:
        """``b D``, the Bradley-Terry logit of the pair."""
        chosen, rejected = self.scores()
        return self.options.beta * (chosen - rejected)

    def per_token(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """Divides by the numbers of scored tokens; what has none scores 0 and stays 0."""
        n_w, n_l = self.chosen_lengths, self.rejected_lengths
        if n_w is None or n_l is None:
            return chosen, rejected
        return chosen / n_w.clamp(min=1), rejected / n_l.clamp(min=1)


# score functions s(x) = f'(e^x), up to a constant, of f-DPO (arXiv:2309.16240, table 1)


def reverse_kl(x: Tensor, coef: float) -> Tensor:
    """``x``: plain DPO."""
    return x


def forward_kl(x: Tensor, coef: float) -> Tensor:
    """``1 - exp(-x)``, the exponent held below 80."""
    return -saturating.expm1(-x)


def js_divergence(x: Tensor, coef: float) -> Tensor:
    """``log 2 + ls(x)``."""
    return math.log(2) + F.logsigmoid(x)


def alpha_divergence(x: Tensor, coef: float) -> Tensor:
    """``(exp((a - 1) x) - 1) / (a - 1)``, the exponent held below 80; reverse KL at ``a = 1``."""
    if abs(coef - 1) < 1e-6:
        return x
    return saturating.expm1(x * (coef - 1)) / (coef - 1)


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
    return _smoothed(x.logits(), x.options.label_smoothing)


def sigmoid_norm(x: PairLogps) -> Tensor:
    """``-ls(b (s(c)/n_w - s(r)/n_l))``: length-normalised DPO (as in Tulu 3, arXiv:2411.15124)."""
    chosen, rejected = x.per_token(*x.scores())
    return -F.logsigmoid(x.options.beta * (chosen - rejected))


def hinge(x: PairLogps) -> Tensor:
    """``max(0, 1 - bD)``: the hinge of SLiC (arXiv:2305.10425) on log-ratios."""
    return torch.relu(1 - x.logits())


def ipo(x: PairLogps) -> Tensor:
    """``(s(c)/n_w - s(r)/n_l - 1/(2b))^2`` (arXiv:2310.12036, eq. 17), per scored token."""
    chosen, rejected = x.per_token(*x.scores())
    return (chosen - rejected - 1 / (2 * x.options.beta)) ** 2


def exo_pair(x: PairLogps) -> Tensor:
    """``q (log q - log(1-e)) + q' (log q' - log e)`` with ``q = sigmoid(bD) = 1 - q'``.

    EXO, arXiv:2402.00856, eq. 16.
    """
    logits, smoothing = x.logits(), x.options.label_smoothing
    chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-smoothing))
    rejected = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(smoothing))
    return chosen + rejected


def nca_pair(x: PairLogps) -> Tensor:
    """``-ls(bc) - ls(-bc)/2 - ls(-br)/2`` (arXiv:2402.05369, with two answers)."""
    chosen, rejected = x.options.beta * x.c, x.options.beta * x.r
    return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2


def robust(x: PairLogps) -> Tensor:
    """``[-(1-e) ls(bD) + e ls(-bD)] / (1-2e)``: unbiased by flipped labels (arXiv:2403.00409)."""
    logits, smoothing = x.logits(), x.options.label_smoothing
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
    return saturating.sigmoid(-x.options.beta * x.c) + saturating.sigmoid(x.options.beta * x.r)


def apo_down(x: PairLogps) -> Tensor:
    """``sigmoid(bc) + 1 - sigmoid(b (c - r))`` (arXiv:2408.06266, eq. 8)."""
    return saturating.sigmoid(x.options.beta * x.c) + saturating.sigmoid(
        -x.options.beta * (x.c - x.r)
    )


def discopop(x: PairLogps) -> Tensor:
    """``-(1-m) ls(y) + m exp(-y)``, ``m = sigmoid(y / tau)``, y = bD (arXiv:2406.08414, eq. 5)."""
    logits = x.logits()
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
    # a pair's gradient depends on the log-probs of the other pairs
    sorts_pairs: bool = False


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(sigmoid, label_smoothing=True, f_divergence=True),
    "sigmoid_norm": Loss(sigmoid_norm, f_divergence=True, lengths=True),
    "hinge": Loss(hinge, f_divergence=True),
    "ipo": Loss(ipo, f_divergence=True, lengths=True),
    "exo_pair": Loss(exo_pair, label_smoothing=True, f_divergence=True),
    "nca_pair": Loss(nca_pair),
    "robust": Loss(robust, label_smoothing=True, f_divergence=True),
    "bco_pair": Loss(bco_pair),
    "sppo_hard": Loss(sppo_hard),
    "aot": Loss(aot, label_smoothing=True, sorts_pairs=True),
    "aot_unpaired": Loss(aot_unpaired, label_smoothing=True, sorts_pairs=True),
    "apo_zero": Loss(apo_zero),
    "apo_down": Loss(apo_down),
    "discopop": Loss(discopop, f_divergence=True),
    "sft": Loss(sft, lengths=True, reference=False),
    "simpo": Loss(simpo, lengths=True, reference=False),
}


def pair_losses(x: PairLogps) -> Tensor:
    """The weighted sum of the losses of ``x.options``, one value a pair."""
    each = (
        _call_user_loss(name, x) if callable(name) else LOSSES[name].function(x)
        for name in x.options.loss_types
    )
    weights = x.options.loss_weights
    weighted = (y if w == 1.0 else y * w for y, w in zip(each, weights, strict=True))
    return functools.reduce(torch.add, weighted)


def _call_user_loss(function: LossFunction, x: PairLogps) -> Tensor:
    losses: Any = function(x.c, x.r)
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


def needs_reference(o: LossOptions) -> bool:
    """Whether some loss of the mix compares with a reference model."""
    return not o.reference_free and any(
        callable(name) or LOSSES[name].reference for name in o.loss_types
    )


def takes_lengths(o: LossOptions) -> bool:
    """Whether some loss of the mix divides by numbers of scored tokens."""
    return any(not callable(name) and LOSSES[name].lengths for name in o.loss_types)


def make_options(
    *,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = _F_ALPHA,
    discopop_tau: float = _TAU,
    simpo_gamma: float = _GAMMA,
    average_log_prob: bool = False,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    reduction: str = "mean",
) -> LossOptions:
    """LossOptions from what users pass: plain numbers, so that no gradient is dropped silently.

    Raises:
        ValueError: an option out of range, or one that no chosen loss takes.
        TypeError: an option of another type, tensors among them.
    """
    types, weights = _mix(loss_type, loss_weights)
    f_divergence = "alpha_divergence" if f_divergence == "alpha" else f_divergence
    options = LossOptions(
        types,
        weights,
        check_positive("beta", beta),
        check_number("label_smoothing", label_smoothing),
        check_flag("reference_free", reference_free),
        check_choice("f_divergence", f_divergence, F_DIVERGENCES),
        check_finite("f_alpha_divergence_coef", f_alpha_divergence_coef),
        check_positive("discopop_tau", discopop_tau),
        check_finite("simpo_gamma", simpo_gamma),
        check_flag("average_log_prob", average_log_prob),
        None if ld_alpha is None else check_number("ld_alpha", ld_alpha),
        check_flag("use_weighting", use_weighting),
        check_choice("reduction", reduction, REDUCTIONS),
    )
    _check(options)
    return options


def _mix(
    loss_type: Any, loss_weights: Any
) -> tuple[tuple[str | LossFunction, ...], tuple[float, ...]]:
    """The losses to add up and their weights."""
    types: tuple[Any, ...] = (loss_type,)
    given = type(loss_type).__name__
    of_dict = isinstance(loss_type, dict)
    if of_dict:
        if loss_weights is not None:
            raise ValueError("loss_weights: given beside a loss_type that is a dict of weights")
        by_name = cast("dict[Any, Any]", loss_type)
        types, loss_weights = tuple(by_name), list(by_name.values())
    elif isinstance(loss_type, list | tuple):
        types = tuple(cast("list[Any]", loss_type))
    elif not (isinstance(loss_type, str) or callable(loss_type)):
        # a set has no order, so its weights would have none either
        raise TypeError(
            "loss_type: expected a name, a callable, a list of them or a dict of weights, "
            f"got {given}"
        )
    if not types:
        raise ValueError(f"loss_type: expected a loss, got an empty {given}")
    for name in types:
        if not callable(name) and not isinstance(name, str):
            raise TypeError(
                f"loss_type: expected names or callables in a list, got {type(name).__name__}"
            )
        if not callable(name) and name not in LOSSES:
            raise ValueError(f"loss_type: {name!r} is not one of {', '.join(LOSSES)} or a callable")
    if loss_weights is None:
        return types, (1.0,) * len(types)
    if not isinstance(loss_weights, list | tuple):
        raise TypeError(f"loss_weights: expected a list, got {type(loss_weights).__name__}")
    weights = cast("list[Any]", loss_weights)
    if len(weights) != len(types):
        raise ValueError(
            f"loss_weights: expected one for each of {len(types)} losses, got {len(weights)}"
        )
    where = [f"loss_type[{x!r}]" if of_dict else f"loss_weights[{i}]" for i, x in enumerate(types)]
    return types, tuple(map(check_finite, where, weights))


def _check(o: LossOptions) -> None:
    types, smoothing = o.loss_types, o.label_smoothing
    for name, fits, expected in (
        ("label_smoothing", 0 <= smoothing < 1, "0 <= label_smoothing < 1"),
        ("label_smoothing", "robust" not in types or smoothing < 0.5, "< 0.5 for 'robust'"),
        ("label_smoothing", "exo_pair" not in types or smoothing > 0, "> 0 for exo_pair, say 1e-3"),
        ("ld_alpha", o.ld_alpha is None or 0 <= o.ld_alpha <= 1, "0 <= ld_alpha <= 1"),
    ):
        if not fits:
            raise ValueError(f"{name}: expected {expected}, got {getattr(o, name)!r}")
    known = [LOSSES[name] for name in types if isinstance(name, str)]
    for name, default, taken in (
        ("label_smoothing", 0.0, any(x.label_smoothing for x in known)),
        ("f_divergence", "reverse_kl", any(x.f_divergence for x in known)),
        ("f_alpha_divergence_coef", _F_ALPHA, o.f_divergence == "alpha_divergence"),
        ("discopop_tau", _TAU, "discopop" in types),
        ("simpo_gamma", _GAMMA, "simpo" in types),
    ):
        if not taken and getattr(o, name) != default:
            label = " + ".join(getattr(x, "__name__", None) or str(x) for x in types)
            raise ValueError(
                f"{name}: loss_type {label!r} with f_divergence {o.f_divergence!r} does not take "
                f"it, got {getattr(o, name)!r}"
            )
