"""What autograd may rely on, from logits and from hidden states."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dpo_kernels
from tests.entries import assert_all_same_bits, make_entry, packings, sources
from tests.helpers import assert_same_bits, make_problem

# the fused sigmoid, and a loss on top of the sequence log-probs
losses = pytest.mark.parametrize("loss_type", ("sigmoid", "ipo"))
functions = pytest.mark.parametrize("function", ("dpo_loss", "sequence_logps", "token_logps"))


def scalar(entry, function: str) -> torch.Tensor:
    out = getattr(entry, function)()
    return out.loss if function == "dpo_loss" else out.sum()


@losses
@packings
@sources
def test_expanded_grad_output(target, source, packed, loss_type):
    """Stride 0, as .sum().backward() hands it over, equals the same gradient in memory."""
    entry = make_entry(source, target, packed=packed)
    for out in (
        entry.dpo_loss(reduction="none", loss_type=loss_type).loss,
        entry.sequence_logps(),
        entry.token_logps(),
    ):
        full = torch.full_like(out, 0.25)
        expected = entry.gradients(out, full, retain_graph=True)
        for grad_output in (full[(0,) * out.dim()].expand(out.shape), full[:1].expand(out.shape)):
            got = entry.gradients(out, grad_output, retain_graph=True)
            assert_all_same_bits(got, expected)
    ones = entry.gradients(out, torch.ones_like(out), retain_graph=True)
    assert_all_same_bits(entry.gradients(out.sum()), ones)


@sources
def test_partly_expanded_and_strided_grad_output(target, source):
    entry = make_entry(source, target, pairs=2, length=4)
    out = entry.token_logps()
    row = torch.randn(4, device=target.device)
    for grad_output in (row.expand(4, 4), row.expand(4, 4).t(), torch.randn(4, 8).to(row)[:, ::2]):
        got = entry.gradients(out, grad_output, retain_graph=True)
        expected = entry.gradients(out, grad_output.contiguous(), retain_graph=True)
        assert_all_same_bits(got, expected)


@sources
def test_zero_grad_output_and_unused_outputs(target, source):
    """Of a token's logp that no loss uses nothing comes back, not even NaN."""
    entry = make_entry(source, target, scored=1.0)
    out = entry.token_logps()
    grad_output = torch.zeros_like(out)
    grad_output[1, 2] = 1.0
    grad = entry.gradients(out, grad_output)[0]
    assert grad.any(-1).nonzero().tolist() == [[1, 2]]
    stats = entry.token_stats()
    assert [value.requires_grad for value in stats] == [True, False, False, False, False]


@sources
def test_nan_grad_output_of_unscored_tokens_goes_nowhere(target, source):
    entry = make_entry(source, target, length=6)
    logps = entry.token_logps(shift=True)
    assert (logps == 0).any()
    grad_output = torch.ones_like(logps).masked_fill(logps == 0, float("nan"))
    expected = entry.gradients(logps, torch.ones_like(logps), retain_graph=True)
    assert_all_same_bits(entry.gradients(logps, grad_output), expected)


@losses
@packings
@sources
def test_two_backward_passes(target, source, packed, loss_type):
    """retain_graph: the second pass gives the same gradients, and .grad adds up."""
    entry = make_entry(source, target, packed=packed)
    loss = entry.dpo_loss(loss_type=loss_type).loss
    loss.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in entry.leaves]
    for leaf in entry.leaves:
        leaf.grad = None
    loss.backward(retain_graph=True)
    assert_all_same_bits([leaf.grad for leaf in entry.leaves], first)
    loss.backward()
    assert_all_same_bits([leaf.grad for leaf in entry.leaves], [2 * grad for grad in first])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@sources
def test_scale_of_a_loss(target, source):
    entry = make_entry(source, target)
    loss = entry.dpo_loss().loss
    one = entry.gradients(loss, retain_graph=True)
    # powers of two round nothing
    for scale in (8, -0.5):
        got = entry.gradients(scale * loss, retain_graph=True)
        assert_all_same_bits(got, [scale * grad for grad in one])


@sources
def test_no_gradient_wanted(target, source):
    entry = make_entry(source, target)
    with torch.no_grad():
        assert not entry.dpo_loss().loss.requires_grad
    detached = entry.with_inputs(*(x.detach() for x in entry.inputs))
    assert not detached.dpo_loss().loss.requires_grad


@losses
def test_gradient_reaches_what_made_the_logits(target, loss_type):
    """Through a head and a sliced vocabulary, against plain autograd."""
    problem = make_problem(target, vocab=9)
    hidden = torch.randn(4, 4, 6, device=target.device)
    weight = torch.randn(12, 6, device=target.device, requires_grad=True)
    grads = []
    for loss, options in (
        (dpo_kernels.dpo_loss, {"backend": target.backend}),
        (dpo_kernels.reference.dpo_loss, {}),
    ):
        logits = (hidden @ weight.t())[..., :9]
        out = loss(logits, problem.labels, *problem.reference, loss_type=loss_type, **options)
        grads.append(torch.autograd.grad(out.loss, weight)[0])
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6)


@functions
@sources
def test_double_backward_raises(target, source, function):
    """Rather than leave a gradient penalty out without a word."""
    entry = make_entry(source, target)
    grad = entry.gradients(scalar(entry, function), create_graph=True)[0]
    penalty = grad.square().sum() + entry.leaves[0].sum()
    with pytest.raises(RuntimeError, match="double backward"):
        penalty.backward()


@functions
@sources
def test_checkpoint(target, source, function):
    """Reentrant and not, also where a graph of the gradient is asked for: saved once, read once."""
    entry = make_entry(source, target)
    plain = entry.gradients(scalar(entry, function))

    def again(*inputs):
        return scalar(entry.with_inputs(*inputs), function)

    out = checkpoint(again, *entry.inputs, use_reentrant=False)
    assert_all_same_bits(entry.gradients(out, create_graph=True), plain)
    for reentrant in (False, True):
        for leaf in entry.leaves:
            leaf.grad = None
        checkpoint(again, *entry.inputs, use_reentrant=reentrant).backward()
        assert_all_same_bits([leaf.grad for leaf in entry.leaves], plain)


@losses
@sources
def test_inference_mode(target, source, loss_type):
    entry = make_entry(source, target)
    expected = entry.dpo_loss(loss_type=loss_type)
    with torch.inference_mode():
        out = entry.dpo_loss(loss_type=loss_type)
    # without a gradient to make, the head's matrix products may be split otherwise
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.chosen_rewards, expected.chosen_rewards)
    if source == "logits":
        assert_same_bits(out.loss, expected.loss.detach())
