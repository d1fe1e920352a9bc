"""Every loss as dpo_loss applies it to a batch: mixes, callables, lengths, averages."""

from __future__ import annotations

import itertools

import pytest
import torch

import dpo_kernels
from dpo_kernels import preference_loss, reference
from dpo_kernels.losses import LOSSES
from tests.helpers import make_problem
from tests.loss_formulas import (
    SMOOTHING,
    TAKES_LENGTHS,
    TAKES_SMOOTHING,
    expected,
    options_of,
    pair_logps,
)


def test_mix_of_a_batch(target):
    """dpo_loss with a list of losses: the same sum, and the sum of the gradients."""
    problem = make_problem(target, vocab=11)
    weights = [0.7, 0.5, 2.0]
    options = {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": weights}
    ours = dpo_kernels.dpo_loss(
        problem.logits, problem.labels, *problem.reference, backend=target.backend, **options
    )
    parts = [
        reference.dpo_loss(problem.logits, problem.labels, *problem.reference, loss_type=name)
        for name in options["loss_type"]
    ]
    total = sum(w * part.loss for w, part in zip(weights, parts, strict=True))
    assert ours.loss.item() == pytest.approx(total.item(), rel=1e-5)
    grads = [torch.autograd.grad(x, problem.logits)[0] for x in (ours.loss, total)]
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6)


def test_weight_of_a_single_loss(target):
    problem = make_problem(target, vocab=11)
    arguments = (problem.logits, problem.labels, *problem.reference)
    one = dpo_kernels.dpo_loss(*arguments, backend=target.backend)
    half = dpo_kernels.dpo_loss(
        *arguments, loss_weights=[0.5], loss_type=["sigmoid"], backend=target.backend
    )
    assert half.loss.item() == pytest.approx(one.loss.item() / 2, rel=1e-6)


def test_callable(target):
    """Of (chosen log-ratios, rejected log-ratios), alone and in a mix, with its gradient."""

    def squared_hinge(chosen, rejected):
        return torch.relu(1 - (chosen - rejected)) ** 2

    logps, _ = pair_logps()
    losses, *_ = preference_loss(*logps, loss_type=squared_hinge)
    truth = [
        max(0.0, 1 - ((w - a) - (l - b))) ** 2 for w, l, a, b in zip(*logps.tolist(), strict=True)
    ]
    assert losses.tolist() == pytest.approx(truth)

    problem = make_problem(target, vocab=11)
    options = {"loss_type": [squared_hinge, "sigmoid"], "loss_weights": [0.25, 1.0]}
    ours = dpo_kernels.dpo_loss(
        problem.logits, problem.labels, *problem.reference, backend=target.backend, **options
    )
    truth = reference.dpo_loss(problem.logits, problem.labels, *problem.reference, **options)
    assert ours.loss.item() == pytest.approx(truth.loss.item(), rel=1e-5)
    grads = [torch.autograd.grad(x.loss, problem.logits)[0] for x in (ours, truth)]
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TAKES_LENGTHS)
@pytest.mark.parametrize("shift", (True, False))
@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
def test_lengths_are_scored_tokens(target, name, shift, packed):
    """With shift, a label on the first token of a sequence is not scored and not counted."""
    problem = make_problem(target, vocab=11, scored=0.8, packed=packed, seed=3)
    rows = problem.labels
    if packed:
        rows = [rows[a:b] for a, b in itertools.pairwise(problem.cu_seqlens.tolist())]
    for row in rows:
        row[0] = 1
    counts = [sum(x != -100 for x in row.tolist()[shift:]) for row in rows]
    wide = problem.logits.detach().double()
    sums = reference.sequence_logps(wide, problem.labels, shift=shift, **problem.layout)
    logps = [*sums.chunk(2), *(x.double() for x in problem.reference)]
    # sft divides by the tokens of all chosen answers together, the others each answer by its own
    lengths = torch.tensor(counts).clamp(min=0 if name == "sft" else 1).chunk(2)
    refs = () if name in ("simpo", "sft") else problem.reference
    out = dpo_kernels.dpo_loss(
        problem.logits,
        problem.labels,
        *refs,
        shift=shift,
        reduction="none",
        backend=target.backend,
        **problem.layout,
        **options_of(name),
    )
    truth = expected(name, logps, lengths, "reverse_kl", 0.0)
    assert out.loss.tolist() == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("name", TAKES_LENGTHS)
def test_averaged_log_probs_are_not_divided_again(target, name):
    """average_log_prob: the log-probs are means already."""
    problem = make_problem(target, vocab=11, seed=4)
    refs = () if name in ("simpo", "sft") else problem.reference
    out = dpo_kernels.dpo_loss(
        problem.logits,
        problem.labels,
        *refs,
        average_log_prob=True,
        reduction="none",
        backend=target.backend,
        **options_of(name),
    )
    means = reference.sequence_logps(
        problem.logits.detach().double(), problem.labels, average_log_prob=True
    ).chunk(2)
    zeros = torch.zeros_like(means[0])
    given = [x.double() for x in refs] or [zeros, zeros]
    ones = torch.ones_like(means[0])
    truth = expected(name, [*means, *given], [ones, ones], "reverse_kl", 0.0)
    if name == "sft":
        truth = (-means[0]).tolist()
    assert out.loss.tolist() == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_from_logits(target, name):
    """dpo_loss gives preference_loss of its own sequence log-probs."""
    problem = make_problem(target, vocab=11, seed=5)
    smoothing = SMOOTHING if name in TAKES_SMOOTHING else 0.0
    refs = () if name in ("simpo", "sft") else problem.reference
    arguments = (problem.logits, problem.labels, *refs)
    options = options_of(name, smoothing=smoothing)
    ours = dpo_kernels.dpo_loss(*arguments, backend=target.backend, **options)
    truth = reference.dpo_loss(*arguments, **options)
    assert ours.losses.tolist() == pytest.approx(truth.losses.tolist(), rel=1e-4)
    grads = [torch.autograd.grad(x.loss, problem.logits)[0] for x in (ours, truth)]
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-5)
