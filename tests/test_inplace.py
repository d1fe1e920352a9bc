"""inplace_backward: what is overwritten, what is refused, and who is told."""

from __future__ import annotations

import pytest
import torch

import dpo_kernels
from tests.entries import loss_of, packings
from tests.helpers import assert_same_bits, make_problem
from tests.test_parity import gradient

losses = pytest.mark.parametrize("loss_type", ("sigmoid", "ipo"))


@losses
@packings
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("strided", (False, True), ids=("contiguous", "sliced"))
def test_in_place_backward(target, dtype, packed, strided, loss_type):
    """The logits' memory holds the fresh backward's bits, their version has moved, once only."""
    layout = "sliced vocabulary" if strided else "contiguous"
    problem = make_problem(target, dtype, packed=packed, layout=layout)
    options = {"loss_type": loss_type, "label_smoothing": 0.1 if loss_type == "sigmoid" else 0.0}
    fresh = gradient(problem, loss_of(problem, target.backend, **options).loss)

    # the padding of the larger tensor must survive
    storage = torch.full((*problem.logits.shape[:-1], problem.vocab + 3), 7.0).to(problem.logits)
    storage[..., : problem.vocab] = problem.logits.detach()
    storage.requires_grad_()
    logits = (storage * 1)[..., : problem.vocab]
    whole = logits._base
    version = logits._version
    loss = loss_of(problem, target.backend, logits, inplace_backward=True, **options).loss
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr()
    assert_same_bits(grad, fresh)
    assert_same_bits(logits.detach(), fresh)
    assert logits._version > version
    assert (whole[..., problem.vocab :] == 7.0).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("function", ("token_logps", "sequence_logps"))
@packings
def test_in_place_backward_of_log_probs(target, function, packed):
    """token_logps and sequence_logps overwrite the logits they scored, with the same bits."""
    if packed and function == "token_logps":
        pytest.skip("token_logps has no cu_seqlens")
    problem = make_problem(target, packed=packed)
    call = getattr(dpo_kernels, function)
    options = {"backend": target.backend, **(problem.layout if packed else {})}
    fresh = gradient(problem, call(problem.logits, problem.labels, **options).square().sum())
    logits = problem.logits * 1
    out = call(logits, problem.labels, inplace_backward=True, **options).square().sum()
    (grad,) = torch.autograd.grad(out, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr()
    assert_same_bits(grad, fresh)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_in_place_backward_spoils_no_other_use_silently(target):
    """Whoever saved the logits for another backward is told."""
    problem = make_problem(target)
    logits = problem.logits * 1
    other = logits.square().sum()
    loss_of(problem, target.backend, logits, inplace_backward=True).loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_in_place_backward_of_copied_logits(target):
    """Logits without unit stride are copied: it is the copy that is overwritten."""
    problem = make_problem(target)
    fresh = gradient(problem, loss_of(problem, target.backend).loss)
    transposed = problem.logits.detach().transpose(1, 2).contiguous().transpose(1, 2)
    transposed.requires_grad_()
    before = transposed.detach().clone()
    loss = loss_of(problem, target.backend, transposed, inplace_backward=True).loss
    assert_same_bits(torch.autograd.grad(loss, transposed)[0], fresh)
    assert_same_bits(transposed.detach(), before)


@pytest.mark.parametrize("dim", (0, 1))
def test_in_place_backward_refuses_expanded_logits(dim):
    shape = [2, 3, 5]
    shape[dim] = 1
    logits = torch.zeros(shape, requires_grad=True).expand(2, 3, 5)
    labels = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"inplace_backward: .*expanded"):
        dpo_kernels.dpo_loss(logits, labels, reference_free=True, inplace_backward=True)


def test_in_place_backward_refuses_overlapping_logits():
    logits = torch.zeros(30).as_strided((2, 3, 5), (12, 4, 1)).requires_grad_()
    labels = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"inplace_backward: .*overlapping"):
        dpo_kernels.dpo_loss(logits, labels, reference_free=True, inplace_backward=True)


def test_expanded_logits_have_a_gradient(target):
    """Fresh gradients have memory of their own, so expanded logits are fine there."""
    row = torch.randn(1, 1, 5, device=target.device, requires_grad=True)
    labels = torch.tensor([[0, 1, 2], [3, 4, 0]], device=target.device)
    grads = []
    for loss, options in (
        (dpo_kernels.dpo_loss, {"backend": target.backend}),
        (dpo_kernels.reference.dpo_loss, {}),
    ):
        out = loss(row.expand(2, 3, 5), labels, reference_free=True, **options)
        grads.append(torch.autograd.grad(out.loss, row)[0])
    assert torch.allclose(*grads, atol=1e-6)
