"""Logits of -inf mask a class; NaN and +inf reach their own row and nothing else."""

from __future__ import annotations

import math

import pytest
import torch

import dpo_kernels
from dpo_kernels import reference
from tests.helpers import (
    assert_rule,
    assert_same_bits,
    gradient_tolerance,
    logp_tolerance,
    make_problem,
)
from tests.test_parity import check_pairs, gradient

float_dtypes = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16), ids=("float32", "bfloat16", "float16")
)


def masked_vocabulary(target, dtype):
    """Two pairs with a third of every row at -inf, never at the label."""
    problem = make_problem(target, dtype, scored=1.0, seed=11)
    mask = torch.rand(problem.logits.shape) < 1 / 3
    mask = mask.to(target.device).scatter_(-1, problem.labels.unsqueeze(-1), False)
    return problem, problem.logits.detach().masked_fill(mask, -math.inf)


@float_dtypes
def test_masked_vocabulary(target, dtype):
    problem, logits = masked_vocabulary(target, dtype)
    check_tokens_with_infinities(target, problem, logits)
    aligned = problem.with_logits(logits)
    check_pairs(target, aligned, shift=False)


def check_tokens_with_infinities(target, problem, logits) -> None:
    """Like the parity tests, NaN where the truth is NaN."""
    dtype = logits.dtype
    ours, theirs, wide = (problem.with_logits(logits.to(d)) for d in (dtype, dtype, torch.float64))
    stats = dpo_kernels.token_stats(ours.logits, ours.labels, backend=target.backend)
    alone = dpo_kernels.token_logps(ours.logits, ours.labels, backend=target.backend)
    assert torch.equal(stats.logps.nan_to_num(7.0), alone.nan_to_num(7.0))
    references = [reference.token_stats(p.logits, p.labels) for p in (theirs, wide)]
    tolerance = logp_tolerance(references[1].logps.nan_to_num(0, 0, 0), dtype, problem.vocab)
    for name in ("logps", "entropy", "log_sum_sq_probs", "mean_logits"):
        values = [getattr(s, name) for s in (stats, *references)]
        assert_rule(name, *values, tolerance * (1 + math.log(problem.vocab)))
    finite = references[1].logps.isfinite()
    assert torch.equal(stats.is_top1[finite], references[1].is_top1[finite])
    grads = [gradient(ours, stats.logps.sum())]
    grads += [gradient(p, s.logps.sum()) for p, s in zip((theirs, wide), references, strict=True)]
    truth = grads[-1]
    assert_rule(
        "gradient", *grads, gradient_tolerance(truth.nan_to_num(0), target, dtype, problem.vocab)
    )


@float_dtypes
def test_masked_label(target, dtype):
    """A label of probability 0: logp -inf, its gradient onehot - p as ever."""
    problem, logits = masked_vocabulary(target, dtype)
    logits[1, 2, problem.labels[1, 2]] = -math.inf
    check_tokens_with_infinities(target, problem, logits)
    one = problem.with_logits(logits)
    out = dpo_kernels.token_logps(one.logits, one.labels, backend=target.backend)
    assert out[1, 2].item() == -math.inf
    assert gradient(one, out.sum())[1, 2, problem.labels[1, 2]].item() == 1.0


@pytest.mark.parametrize("side", ("chosen", "rejected"))
def test_masked_label_of_a_pair(target, side):
    """A chosen answer without a chance costs +inf, a rejected one nothing; as in the reference."""
    problem = make_problem(target, pairs=1, scored=1.0, seed=12)
    row = 0 if side == "chosen" else 1
    logits = problem.logits.detach().clone()
    logits[row, 1, problem.labels[row, 2]] = -math.inf
    problem, wide = problem.with_logits(logits), problem.with_logits(logits.double())
    out = dpo_kernels.dpo_loss(
        problem.logits, problem.labels, *problem.reference, backend=target.backend
    )
    truth = reference.dpo_loss(wide.logits, wide.labels, *wide.reference)
    assert out.loss.item() == truth.loss.item() == (math.inf if side == "chosen" else 0.0)
    grads = gradient(problem, out.loss), gradient(wide, truth.loss)
    assert_rule(
        "gradient",
        grads[0],
        grads[1],
        grads[1],
        gradient_tolerance(grads[1], target, torch.float32, problem.vocab),
    )


@float_dtypes
@pytest.mark.parametrize("value", (math.nan, math.inf), ids=("nan", "+inf"))
@pytest.mark.parametrize("place", ("first", "label", "last"))
def test_nan_and_inf_propagate(target, dtype, value, place):
    """To the log-prob and gradient of their own row, whole, and to nothing else."""
    problem = make_problem(target, dtype, scored=1.0, seed=13)
    logits = problem.logits.detach().clone()
    column = {"first": 0, "label": problem.labels[1, 2].item(), "last": -1}[place]
    logits[1, 2, column] = value
    dirty = problem.with_logits(logits)
    clean = dpo_kernels.token_logps(problem.logits, problem.labels, backend=target.backend)
    out = dpo_kernels.token_logps(dirty.logits, dirty.labels, backend=target.backend)
    truth = reference.token_logps(logits.double(), problem.labels)
    assert out.isnan().nonzero().tolist() == truth.isnan().nonzero().tolist() == [[1, 2]]
    elsewhere = torch.ones_like(out, dtype=torch.bool)
    elsewhere[1, 2] = False
    assert_same_bits(out[elsewhere], clean[elsewhere])
    grad, expected = gradient(dirty, out.sum()), gradient(problem, clean.sum())
    assert grad[1, 2].isnan().all()
    assert_same_bits(grad[elsewhere], expected[elsewhere])


@pytest.mark.parametrize("value", (-math.inf, math.nan), ids=("-inf", "nan"))
def test_row_without_a_distribution(target, value):
    """All logits of a row at -inf have no softmax: NaN, as in the reference, in that row only."""
    problem = make_problem(target, scored=1.0, seed=14)
    logits = problem.logits.detach().clone()
    logits[0, 1] = value
    dirty = problem.with_logits(logits)
    out = dpo_kernels.token_logps(dirty.logits, dirty.labels, backend=target.backend)
    assert out.isnan().nonzero().tolist() == [[0, 1]]
    assert gradient(dirty, out.sum()).isnan().any(-1).nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("ld_alpha", (0.0, 0.5))
@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
@pytest.mark.parametrize("from_hidden", (False, True), ids=("logits", "hidden"))
def test_impossible_token_beyond_the_shared_length(target, from_hidden, packed, ld_alpha):
    """-inf at a label that weighs ld_alpha: nothing of it is left for a weight of 0."""
    problem = make_problem(target, pairs=1, length=5, scored=2.0, packed=False, seed=18)
    logits, labels = problem.logits.detach().clone(), problem.labels
    # the last class is the label of that token alone
    labels.remainder_(66)
    labels[0, 4], labels[1, 3:] = 66, -100
    logits[0, 3, 66] = -math.inf
    cu_seqlens, shape = None, (2, 5)
    if packed:
        cu_seqlens, shape = torch.tensor([0, 5, 10], device=target.device), (10,)
    logits, labels = logits.view(*shape, 67).requires_grad_(), labels.view(shape)
    options = {"ld_alpha": ld_alpha, "cu_seqlens": cu_seqlens, "backend": target.backend}
    if from_hidden:
        # the logits themselves as hidden states, and a head that hands -inf through as a bias
        bias = torch.zeros(67, device=target.device)
        bias[66] = -math.inf
        hidden, weight = logits.detach().nan_to_num(neginf=0.0), torch.eye(67, device=target.device)
        hidden.requires_grad_()
        out = dpo_kernels.linear_dpo_loss(
            hidden, weight.requires_grad_(), labels, *problem.reference, bias=bias, **options
        )
        (grad,) = torch.autograd.grad(out.loss, hidden)
    else:
        out = dpo_kernels.dpo_loss(logits, labels, *problem.reference, **options)
        (grad,) = torch.autograd.grad(out.loss, logits)
    if ld_alpha == 0:
        assert out.chosen_logps.isfinite().all() and out.loss.isfinite() and grad.isfinite().all()
    else:
        assert out.chosen_logps.item() == -math.inf
