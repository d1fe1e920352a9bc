"""torch.set_default_dtype changes nothing: every constant of the package has a dtype of its own."""

from __future__ import annotations

import pytest
import torch

import dpo_kernels as dk
from tests.helpers import assert_same_bits, make_problem
from tests.linear_helpers import make_head, with_gradients

# what makes weights, masks, zeros and scales of its own
OPTIONS = {
    "plain": {},
    "mean": {"average_log_prob": True},
    "ld": {"ld_alpha": 0.3},
    "wpo": {"use_weighting": True},
    "lengths": {"loss_type": ["ipo", "sft", "sigmoid_norm"]},
    "reference free": {"loss_type": "simpo"},
    "softmax": {"temperature": 0.7},
}
packings = pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
cases = pytest.mark.parametrize("name", OPTIONS)
defaults = pytest.mark.parametrize("default", (torch.float64, torch.bfloat16))


def results(problem, head, options):
    """Losses and gradients from logits and from hidden states, on both CPU backends."""
    refs, head_refs = problem.reference, head.reference_logps
    if options.get("loss_type") == "simpo":
        refs = head_refs = ()
    for backend in ("cpu", "torch"):
        options = {**options, "backend": backend}
        out = dk.dpo_loss(problem.logits, problem.labels, *refs, **problem.layout, **options)
        yield out.losses
        yield torch.autograd.grad(out.loss, problem.logits)[0]
        out, gradients = with_gradients(
            dk.linear_dpo_loss, head, *head_refs, **head.head, **options
        )
        yield out.losses
        yield from gradients


@cases
@packings
@defaults
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_same_bits_under_every_default_dtype(default, dtype, packed, name):
    options = OPTIONS[name]
    problem = make_problem(dtype=dtype, packed=packed, pairs=3, length=6)
    head = make_head(dtype=dtype, packed=packed, frozen=name in ("mean", "wpo"))
    expected = list(results(problem, head, options))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        got = list(results(problem, head, options))
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)
