"""Weights and statistics of tokens: LD-DPO, WPO, and the statistics by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import dpo_kernels
from tests.entries import packings
from tests.helpers import assert_rule, gradient_tolerance, make_problem
from tests.test_parity import gradient


def scored_tokens(problem, shift=True) -> list[list[tuple[int, int]]]:
    """Per sequence the (row of logits, label) of every scored token; rows count over the batch."""
    labels = problem.labels.flatten().tolist()
    if problem.cu_seqlens is None:
        length = problem.labels.shape[1]
        bounds = [s * length for s in range(problem.labels.shape[0] + 1)]
    else:
        bounds = problem.cu_seqlens.tolist()
    return [
        [(t - shift, labels[t]) for t in range(start + shift, end) if labels[t] != -100]
        for start, end in itertools.pairwise(bounds)
    ]


def log_softmax_rows(problem) -> torch.Tensor:
    return problem.logits.double().flatten(0, -2).log_softmax(-1)


def plain_loss(logps, refs, beta=0.1):
    """-ls(b D) per pair from lists of sequence log-probs, differentiable."""
    pairs = len(logps) // 2
    sums = torch.stack(logps)
    c, r = sums[:pairs] - refs[0].double(), sums[pairs:] - refs[1].double()
    return -torch.nn.functional.logsigmoid(beta * (c - r))


@packings
@pytest.mark.parametrize("average", (False, True))
@pytest.mark.parametrize("ld_alpha", (0.0, 0.4, 1.0))
def test_ld_dpo(target, packed, average, ld_alpha):
    """Tokens beyond the shorter answer's length weigh ld_alpha, in values and gradients."""
    problem = make_problem(target, pairs=3, length=7, vocab=11, packed=packed, seed=30)
    wide = problem.double()
    rows, tokens = log_softmax_rows(wide), scored_tokens(problem)
    logps = []
    for s, mine in enumerate(tokens):
        shared = min(len(mine), len(tokens[(s + 3) % 6]))
        total = rows.sum() * 0.0
        for n, (row, label) in enumerate(mine):
            total = total + rows[row, label] * (1.0 if n < shared else ld_alpha)
        logps.append(total / max(len(mine), 1) if average else total)
    truth = plain_loss(logps, problem.reference)
    out = dpo_kernels.dpo_loss(
        problem.logits,
        problem.labels,
        *problem.reference,
        ld_alpha=ld_alpha,
        average_log_prob=average,
        reduction="none",
        backend=target.backend,
        **problem.layout,
    )
    assert out.loss.tolist() == pytest.approx(truth.tolist(), rel=1e-5)
    grads = gradient(problem, out.loss.sum()), gradient(wide, truth.sum())
    tolerance = gradient_tolerance(grads[1], target, torch.float32, 11, c_error=1e-5)
    assert_rule("gradient", grads[0], grads[1], grads[1], tolerance)


@packings
def test_ld_dpo_applies_to_the_reference_too(target, packed):
    """Reference logits equal to the policy's give ln 2 whatever the lengths."""
    problem = make_problem(target, pairs=2, length=7, vocab=11, packed=packed, seed=31)
    out = dpo_kernels.dpo_loss(
        problem.logits,
        problem.labels,
        reference_logits=problem.logits.detach(),
        ld_alpha=0.3,
        backend=target.backend,
        **problem.layout,
    )
    assert out.losses.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-7)


@packings
def test_wpo(target, packed):
    """Losses times w_w w_l, w = exp(mean(logp - log sum p^2)), without gradient through w."""
    problem = make_problem(target, pairs=3, length=6, vocab=11, packed=packed, seed=32)
    problem.labels[problem.labels.shape[0] - 1] = -100
    wide = problem.double()
    rows, tokens = log_softmax_rows(wide), scored_tokens(problem)
    squares = (2 * rows).exp().sum(-1).log()
    logps, weights = [], []
    for mine in tokens:
        picked = [rows[row, label] for row, label in mine]
        logps.append(sum(picked, rows.sum() * 0.0))
        aligned = [x.item() - squares[row].item() for x, (row, _) in zip(picked, mine, strict=True)]
        weights.append(math.exp(sum(aligned) / max(len(mine), 1)))
    pair_weights = torch.tensor(weights[:3]) * torch.tensor(weights[3:])
    truth = plain_loss(logps, problem.reference) * pair_weights.double().to(target.device)
    out = dpo_kernels.dpo_loss(
        problem.logits,
        problem.labels,
        *problem.reference,
        use_weighting=True,
        reduction="none",
        backend=target.backend,
        **problem.layout,
    )
    assert out.loss.tolist() == pytest.approx(truth.tolist(), rel=1e-4)
    grads = gradient(problem, out.loss.sum()), gradient(wide, truth.sum())
    tolerance = gradient_tolerance(grads[1], target, torch.float32, 11, c_error=1e-4)
    assert_rule("gradient", grads[0], grads[1], grads[1], tolerance)


def test_top_1_is_the_first_maximum(target):
    """Of equal maxima only the first counts, also when a block or vector lies between them."""
    for vocab, ties in ((7, (0, 3, 6)), (5000, (1, 8, 130, 4097, 4999))):
        logits = torch.zeros(1, len(ties), vocab, device=target.device)
        logits[..., list(ties)] = 2.0
        labels = torch.tensor([ties], device=target.device)
        stats = dpo_kernels.token_stats(logits, labels, backend=target.backend)
        assert stats.is_top1.tolist() == [[True] + [False] * (len(ties) - 1)]
        # -0.0 equals 0.0
        logits = torch.full((1, 2, vocab), -1.0, device=target.device)
        logits[..., 2], logits[..., 5] = -0.0, 0.0
        labels = torch.tensor([[2, 5]], device=target.device)
        stats = dpo_kernels.token_stats(logits, labels, backend=target.backend)
        assert stats.is_top1.tolist() == [[True, False]]


def test_stats_of_known_distributions(target):
    """Uniform, one certain class, half of the vocabulary masked: the values by hand."""
    logits = torch.zeros(1, 3, 8, device=target.device)
    logits[0, 1, 3] = 200.0
    logits[0, 2, ::2] = -math.inf
    labels = torch.tensor([[7, 3, 1]], device=target.device)
    stats = dpo_kernels.token_stats(logits, labels, backend=target.backend)
    assert stats.logps[0].tolist() == pytest.approx([-math.log(8), 0.0, -math.log(4)])
    assert stats.entropy[0].tolist() == pytest.approx([math.log(8), 0.0, math.log(4)], abs=1e-6)
    assert stats.log_sum_sq_probs[0].tolist() == pytest.approx(
        [-math.log(8), 0.0, -math.log(4)], abs=1e-6
    )
    assert stats.mean_logits[0].tolist() == [0.0, 25.0, -math.inf]
    assert stats.is_top1[0].tolist() == [False, True, True]
