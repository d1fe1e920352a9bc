"""A head that is a copy, cast or gathered for one call: autograd finds it, and nothing keeps it."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import dpo_kernels as dk
from tests.linear_helpers import make_head


def loss_of(hidden, weight, labels) -> torch.Tensor:
    return dk.linear_dpo_loss(hidden, weight, labels, reference_free=True).loss


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_a_copy_is_free_after_the_forward(frozen):
    problem = make_head()
    leaf = problem.weight.detach().requires_grad_(not frozen)
    weight = leaf.clone()
    storage = StorageWeakRef(weight.untyped_storage())
    hidden = problem.hidden.detach().requires_grad_()
    loss = loss_of(hidden, weight, problem.labels)
    del weight
    assert storage.expired()
    loss.backward()
    plain = [problem.hidden.detach().requires_grad_(), leaf.detach().requires_grad_(not frozen)]
    loss_of(*plain, problem.labels).backward()
    assert torch.equal(hidden.grad, plain[0].grad)
    assert frozen or torch.equal(leaf.grad, plain[1].grad)


def test_a_second_derivative_by_a_copy_raises():
    """Though the backward has no more of the copy than its way back to the leaf."""
    problem = make_head()
    leaf = problem.weight.detach().requires_grad_()
    loss = loss_of(problem.hidden.detach(), leaf * 1, problem.labels)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.square().sum(), leaf)
