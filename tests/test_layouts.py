"""What a batch's layout may not change: its order, how it is cut, and from where it is computed."""

from __future__ import annotations

import pytest
import torch

import dpo_kernels as dk
from tests.fuzz.strategies import LOSSES
from tests.helpers import assert_same_bits, make_problem
from tests.linear_helpers import make_head

PAIRS = 5
# a pair's loss and derivative depend on that pair alone
BY_PAIR = [name for name in LOSSES if name not in ("aot", "aot_unpaired", "sft")]
heads = pytest.mark.parametrize("frozen", (False, True), ids=("trainable", "frozen"))
options = pytest.mark.parametrize(
    "extra",
    ({}, {"ld_alpha": 0.3}, {"use_weighting": True}, {"average_log_prob": True}),
    ids=("plain", "ld_alpha", "use_weighting", "average"),
)


@pytest.fixture(autouse=True)
def one_thread(threads):
    # small problems: threads would only wait for each other
    threads(1)


def rows_of(pairs: torch.Tensor) -> torch.Tensor:
    return torch.cat((pairs, pairs + PAIRS))


def loss_options(name: str) -> dict:
    return {"loss_type": name, "label_smoothing": 0.1 if name == "exo_pair" else 0.0}


def from_logits(problem, pairs, name, extra):
    """(losses, gradient) of some pairs, in that order, as a sum."""
    rows = rows_of(pairs)
    logits = problem.logits.detach()[rows].requires_grad_()
    output = dk.dpo_loss(
        logits,
        problem.labels[rows],
        *(x[pairs] for x in problem.reference),
        reduction="sum",
        **loss_options(name),
        **extra,
    )
    return output.losses, torch.autograd.grad(output.loss, logits)[0]


@options
@pytest.mark.parametrize("name", BY_PAIR)
def test_permuted_and_split_from_logits(name, extra):
    """The bits of a pair are its own, in any order and in any call."""
    problem = make_problem(pairs=PAIRS, length=6)
    losses, gradient = from_logits(problem, torch.arange(PAIRS), name, extra)
    order = torch.tensor([3, 0, 4, 2, 1])
    for part in (order, order[:2], order[2:], order[:1]):
        some, some_gradient = from_logits(problem, part, name, extra)
        assert_same_bits(some, losses[part])
        assert_same_bits(some_gradient, gradient[rows_of(part)])


@heads
@options
@pytest.mark.parametrize("name", ("sigmoid", "ipo", "simpo", "robust"))
def test_permuted_and_split_from_hidden_states(name, extra, frozen):
    """GEMMs of another shape may round otherwise; no more than that."""
    problem = make_head(pairs=PAIRS, frozen=frozen, bias=False)

    def run(pairs):
        rows = rows_of(pairs)
        hidden = problem.hidden.detach()[rows].requires_grad_()
        output = dk.linear_dpo_loss(
            hidden,
            problem.weight,
            problem.labels[rows],
            *(x[pairs] for x in problem.reference_logps),
            reduction="sum",
            **loss_options(name),
            **extra,
        )
        leaves = [hidden] if frozen else [hidden, problem.weight]
        return output.losses, *torch.autograd.grad(output.loss, leaves)

    losses, gradient, *weight = run(torch.arange(PAIRS))
    order = torch.tensor([3, 0, 4, 2, 1])
    parts = [run(part) for part in (order[:2], order[2:])]
    close = {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), losses[order], **close)
    for part, (_, some, *_) in zip((order[:2], order[2:]), parts, strict=True):
        torch.testing.assert_close(some, gradient[rows_of(part)], **close)
    if weight:
        torch.testing.assert_close(sum(p[2] for p in parts), weight[0], rtol=1e-4, atol=1e-4)


@options
@pytest.mark.parametrize("name", LOSSES)
def test_padded_is_packed(name, extra):
    """And padding is nothing: the packed batch leaves out what the padded one masks at the end."""
    problem = make_problem(pairs=3, length=7, scored=1.0)
    lengths = [7, 3, 5, 1, 6, 2]
    labels = problem.labels.clone()
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    kept = [problem.logits.detach()[row, :length] for row, length in enumerate(lengths)]
    packed = torch.cat(kept).requires_grad_()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    packed_labels = torch.cat([labels[row, :length] for row, length in enumerate(lengths)])
    keywords = {**loss_options(name), **extra}
    outputs = (
        dk.dpo_loss(problem.logits, labels, *problem.reference, **keywords),
        dk.dpo_loss(packed, packed_labels, *problem.reference, cu_seqlens=cu_seqlens, **keywords),
    )
    torch.testing.assert_close(outputs[0].losses, outputs[1].losses, rtol=1e-6, atol=1e-6)
    padded = torch.autograd.grad(outputs[0].loss, problem.logits)[0]
    gathered = torch.cat([padded[row, :length] for row, length in enumerate(lengths)])
    flat = torch.autograd.grad(outputs[1].loss, packed)[0]
    torch.testing.assert_close(flat, gathered, rtol=1e-5, atol=1e-7)


@options
@pytest.mark.parametrize("name", LOSSES)
def test_hidden_states_are_logits(name, extra):
    """The two families of functions agree where the logits are the head's."""
    problem = make_head(pairs=3)
    logits = problem.hidden @ problem.weight.t() + problem.bias
    keywords = {**loss_options(name), **extra}
    outputs = (
        dk.linear_dpo_loss(
            problem.hidden,
            problem.weight,
            problem.labels,
            *problem.reference_logps,
            bias=problem.bias,
            **keywords,
        ),
        dk.dpo_loss(logits, problem.labels, *problem.reference_logps, **keywords),
    )
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(outputs[0].losses, outputs[1].losses, **close)
    gradients = [torch.autograd.grad(x.loss, problem.leaves) for x in outputs]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **close)


@options
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
def test_backends_against_each_other(name, extra, packed):
    """The CPU kernels agree with plain PyTorch on every loss."""
    problem = make_problem(pairs=3, length=5, vocab=19, packed=packed)
    keywords = {**problem.layout, **loss_options(name), **extra}
    seen = []
    for backend in ("cpu", "torch"):
        output = dk.dpo_loss(
            problem.logits, problem.labels, *problem.reference, **keywords, backend=backend
        )
        seen.append((output.losses, torch.autograd.grad(output.loss, problem.logits)[0]))
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
