"""Each loss and f-divergence, value and derivative, against its formula (loss_formulas.py)."""

from __future__ import annotations

import pytest
import torch

import dpo_kernels
from dpo_kernels import preference_loss, reference
from dpo_kernels.losses import LOSSES
from tests.loss_formulas import (
    ALPHA,
    BATCH_FORMULAS,
    BETA,
    CASES,
    FORMULAS,
    PAIRS,
    SMOOTHING,
    TAKES_LENGTHS,
    TAKES_SMOOTHING,
    expected,
    options_of,
    pair_logps,
)


def test_every_loss_has_a_formula_here():
    assert set(LOSSES) == set(FORMULAS) | set(BATCH_FORMULAS)


@pytest.mark.parametrize(("name", "divergence", "smoothing"), CASES)
def test_values(name, divergence, smoothing):
    logps, lengths = pair_logps()
    extra = {}
    if name in TAKES_LENGTHS:
        extra = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    losses, chosen, rejected = preference_loss(
        *logps, **options_of(name, divergence, smoothing), **extra
    )
    truth = expected(name, logps, lengths, divergence, smoothing)
    assert losses.tolist() == pytest.approx(truth, rel=1e-12, abs=1e-12)
    assert chosen.tolist() == pytest.approx((BETA * (logps[0] - logps[2])).tolist(), rel=1e-14)
    assert rejected.tolist() == pytest.approx((BETA * (logps[1] - logps[3])).tolist(), rel=1e-14)


@pytest.mark.parametrize(("name", "divergence", "smoothing"), CASES)
def test_derivatives(name, divergence, smoothing):
    """d loss / d logps of the mean, against central differences of the formula."""
    logps, lengths = pair_logps(1)
    extra = {}
    if name in TAKES_LENGTHS:
        extra = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    policy = logps[:2].clone().requires_grad_()
    losses, *rewards = preference_loss(
        *policy, *logps[2:], **options_of(name, divergence, smoothing), **extra
    )
    assert not any(r.requires_grad for r in rewards)
    (derivatives,) = torch.autograd.grad(losses.mean(), policy)
    # truncation h^2 f''' / 6 and rounding eps f / h are both below 1e-9
    h = 1e-5
    for side in range(2):
        for pair in range(PAIRS):
            values = []
            for sign in (1, -1):
                moved = logps.clone()
                moved[side, pair] += sign * h
                values.append(sum(expected(name, moved, lengths, divergence, smoothing)) / PAIRS)
            numeric = (values[0] - values[1]) / (2 * h)
            assert derivatives[side, pair].item() == pytest.approx(numeric, rel=1e-6, abs=1e-8)


# ipo squares: with the exponential divergences that is beyond float32
FAR_OUT = [
    *((name, "reverse_kl") for name in LOSSES),
    *((name, "js_divergence") for name, loss in LOSSES.items() if loss.f_divergence),
    *(
        (name, divergence)
        for name, loss in LOSSES.items()
        for divergence in ("forward_kl", "alpha_divergence")
        if loss.f_divergence and name != "ipo"
    ),
]


@pytest.mark.parametrize("name, divergence", FAR_OUT)
def test_losses_stay_finite_far_out(name, divergence):
    """At log-ratios of 300 nats either way, float32, values and derivatives."""
    policy = torch.tensor([[-300.0, 0.0], [0.0, -300.0]], requires_grad=True)
    losses, *_ = preference_loss(
        *policy,
        torch.zeros(2),
        torch.zeros(2),
        **{
            **options_of(name, smoothing=SMOOTHING if name in TAKES_SMOOTHING else 0.0),
            "f_divergence": divergence,
        },
    )
    (derivatives,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.isfinite().all() and derivatives.isfinite().all()


def test_discopop_of_a_lost_pair():
    """m is 0 long before exp(-y) overflows: what is left is the logistic loss."""
    policy = torch.tensor([-1000.0], requires_grad=True)
    zero = torch.zeros(1)
    losses, *_ = preference_loss(policy, zero, zero, zero, beta=0.5, loss_type="discopop")
    (derivative,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.item() == 500.0 and derivative.item() == -0.5


def test_alpha_divergence_limits():
    """Reverse KL at a = 1; "alpha" is TRL's name for it."""
    logps, _ = pair_logps()
    plain = preference_loss(*logps, beta=BETA)[0]
    for coef in (1.0, 1 + 1e-8):
        limit = preference_loss(
            *logps, beta=BETA, f_divergence="alpha_divergence", f_alpha_divergence_coef=coef
        )[0]
        assert torch.allclose(limit, plain, rtol=1e-6)
    options = {"beta": BETA, "f_alpha_divergence_coef": ALPHA}
    a, b = (
        preference_loss(*logps, f_divergence=name, **options)[0]
        for name in ("alpha", "alpha_divergence")
    )
    assert torch.equal(a, b)


def test_mix():
    """Weighted sums of losses, each with what it takes; weights default to 1."""
    logps, lengths = pair_logps()
    names, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.5]
    options = {"beta": BETA, "label_smoothing": SMOOTHING}
    options |= {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    each = [
        expected(n, logps, lengths, "reverse_kl", SMOOTHING if n == "sigmoid" else 0.0)
        for n in names
    ]
    for given, used in ((weights, weights), (None, [1.0] * 3)):
        losses, *_ = preference_loss(*logps, loss_type=names, loss_weights=given, **options)
        truth = [
            sum(w * v for w, v in zip(used, values, strict=True))
            for values in zip(*each, strict=True)
        ]
        assert losses.tolist() == pytest.approx(truth, rel=1e-12)


def test_mix_as_a_dict():
    """{name: weight}: the order is the dict's, the weights are not lost."""
    logps, lengths = pair_logps()
    options = {"beta": BETA, "chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    for module in (dpo_kernels, reference):
        a, *_ = module.preference_loss(*logps, loss_type={"sigmoid": 0.8, "ipo": 0.2}, **options)
        b, *_ = module.preference_loss(
            *logps, loss_type=["sigmoid", "ipo"], loss_weights=[0.8, 0.2], **options
        )
        assert torch.equal(a, b)


def test_half_precision_log_probs_are_widened():
    logps, _ = pair_logps()
    for dtype in (torch.bfloat16, torch.float16):
        losses, *_ = preference_loss(*logps.to(dtype), beta=BETA)
        wide, *_ = preference_loss(*logps.to(dtype).float(), beta=BETA)
        assert losses.dtype == torch.float32 and torch.equal(losses, wide)


def test_reference_free():
    logps, _ = pair_logps()
    zeros = torch.zeros(PAIRS, dtype=torch.float64)
    free = preference_loss(logps[0], logps[1], None, None, reference_free=True)
    given = preference_loss(logps[0], logps[1], zeros, zeros)
    assert all(torch.equal(a, b) for a, b in zip(free, given, strict=True))
