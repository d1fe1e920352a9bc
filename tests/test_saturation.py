"""Losses that level off keep the digits of their slopes, relative to the slopes themselves."""

from __future__ import annotations

import pytest
import torch

import dpo_kernels as dk

# beta = 1: from no slope to speak of down to the smallest that float32 holds
RATIOS = (-80.0, -40.0, -20.0, -9.0, -1.0, 0.0, 1.0, 9.0, 20.0, 40.0, 80.0)


def bump(y: torch.Tensor) -> torch.Tensor:
    """The slope of a sigmoid, the same on both sides of 0."""
    return torch.exp(-y.abs()) / (1 + torch.exp(-y.abs())) ** 2


@pytest.mark.parametrize("loss_type", ("apo_zero", "apo_down"))
def test_slopes_of_both_answers(loss_type):
    c, r = (x.flatten() for x in torch.meshgrid(*[torch.tensor(RATIOS)] * 2, indexing="ij"))
    chosen, rejected = c.clone().requires_grad_(), r.clone().requires_grad_()
    zeros = torch.zeros_like(c)
    losses = dk.preference_loss(chosen, rejected, zeros, zeros, beta=1.0, loss_type=loss_type)[0]
    slopes = torch.autograd.grad(losses.sum(), (chosen, rejected))
    c, r = c.double(), r.double()
    if loss_type == "apo_zero":
        wanted = (-bump(c), bump(r))
    else:
        wanted = (bump(c) - bump(c - r), bump(c - r))
    # the two terms of apo_down may cancel
    terms = (bump(c) + bump(c - r), wanted[1].abs())
    for ours, truth, size in zip(slopes, wanted, terms, strict=True):
        size = truth.abs() if loss_type == "apo_zero" else size
        assert ((ours.double() - truth).abs() <= 1e-6 * size + 1e-37).all()


@pytest.mark.parametrize("divergence", ("forward_kl", "alpha_divergence"))
def test_slopes_of_exponential_divergences(divergence):
    """Through ipo with a slope of its own near -1 / beta: what is left is exp(-x)."""
    ratios = torch.tensor([4.0, 8.0, 12.0, 16.0, 20.0, 40.0])
    chosen, zeros = ratios.clone().requires_grad_(), torch.zeros_like(ratios)
    options = {"beta": 0.01, "loss_type": "ipo", "f_divergence": divergence}
    losses = dk.preference_loss(chosen, zeros, zeros, zeros, **options)[0]
    (slopes,) = torch.autograd.grad(losses.sum(), chosen)
    x = ratios.double()
    a = 0.5 if divergence == "alpha_divergence" else 0.0
    score = (torch.exp((a - 1) * x) - 1) / (a - 1)
    wanted = 2 * (score - 50) * torch.exp((a - 1) * x)
    assert ((slopes.double() - wanted).abs() <= 1e-5 * wanted.abs()).all()
