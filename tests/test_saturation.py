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
