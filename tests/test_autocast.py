"""Under torch.autocast: bfloat16 matrix products, float32 results and gradients."""

from __future__ import annotations

import pytest
import torch

import dpo_kernels
from dpo_kernels import reference
from tests.entries import loss_of
from tests.helpers import assert_same_bits, make_problem
from tests.linear_helpers import make_head, with_gradients


@pytest.mark.parametrize("loss_type", ("sigmoid", "ipo"))
def test_autocast(target, loss_type):
    """bfloat16 logits of an autocast head, float32 results; autocast itself changes no bit."""
    problem = make_problem(target, vocab=9)
    hidden = torch.randn(4, 4, 6, device=target.device)
    weight = torch.randn(9, 6, device=target.device, requires_grad=True)
    with torch.autocast(target.device, torch.bfloat16):
        logits = torch.nn.functional.linear(hidden, weight)
        inside = loss_of(problem, target.backend, logits, loss_type=loss_type)
    assert logits.dtype == torch.bfloat16
    assert inside.loss.dtype == torch.float32
    outside = loss_of(problem, target.backend, logits, loss_type=loss_type)
    assert_same_bits(inside.loss, outside.loss)
    grads = [torch.autograd.grad(x.loss, weight, retain_graph=True)[0] for x in (inside, outside)]
    assert_same_bits(*grads)
    with torch.autocast(target.device, torch.bfloat16):
        again = loss_of(problem, target.backend, logits.float(), loss_type=loss_type)
        assert again.loss.dtype == torch.float32


@pytest.mark.parametrize("master", [False, True], ids=["all float32", "hidden bfloat16"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_autocast_of_a_head(frozen, master):
    """GEMMs in bfloat16, float32 weights get float32 gradients that were never rounded to less."""
    problem = make_head(frozen=frozen, vocab=301)
    hidden = problem.hidden.detach()
    hidden = (hidden.bfloat16() if master else hidden).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = dpo_kernels.linear_dpo_loss(
            hidden, problem.weight, problem.labels, *problem.reference_logps, **problem.head
        )
    leaves = [hidden, *problem.trainable[1:]]
    got = torch.autograd.grad(ours.loss, leaves)
    wide = problem.to(torch.bfloat16).to(torch.float64)
    truth, want = with_gradients(
        reference.linear_dpo_loss, wide, *problem.reference_logps, **wide.head
    )
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=1e-4, atol=1e-4)
    for leaf, a, b in zip(leaves, got, want, strict=True):
        assert a.dtype == leaf.dtype
        tolerance = 1e-4 if leaf.dtype == torch.float32 and leaf is not hidden else 1e-2
        assert (a.double() - b).abs().max() < tolerance * b.abs().max()
