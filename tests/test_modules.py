"""Metrics, and the module and the reference, which take what the functions take."""

from __future__ import annotations

import inspect
import math

import pytest

import dpo_kernels
from dpo_kernels import DPOLoss, reference
from tests.helpers import assert_same_bits, make_problem


def test_metrics(target):
    """TRL's names; means over the pairs; 0-d tensors that nobody has read yet."""
    problem = make_problem(target, pairs=3, vocab=11, seed=43)
    out = dpo_kernels.dpo_loss(
        problem.logits, problem.labels, *problem.reference, beta=0.2, backend=target.backend
    )
    truth = reference.dpo_loss(
        problem.logits.double(), problem.labels, *(x.double() for x in problem.reference), beta=0.2
    )
    chosen = 0.2 * (truth.chosen_logps - problem.reference[0])
    rejected = 0.2 * (truth.rejected_logps - problem.reference[1])
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "logps/chosen": truth.chosen_logps.mean(),
        "logps/rejected": truth.rejected_logps.mean(),
    }
    metrics = out.metrics()
    assert list(metrics) == list(expected)
    for name, value in metrics.items():
        assert value.dim() == 0 and not value.requires_grad
        assert value.device.type == target.device
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-4, abs=1e-5)


def test_equal_rewards_are_no_win(target):
    problem = make_problem(target, vocab=11)
    out = dpo_kernels.dpo_loss(
        problem.logits,
        problem.labels,
        reference_logits=problem.logits.detach(),
        backend=target.backend,
    )
    assert out.metrics()["rewards/accuracies"].item() == 0.0


def test_module_is_the_function(target):
    problem = make_problem(target, vocab=11, packed=True, seed=44)
    arguments = (problem.logits, problem.labels, *problem.reference)
    options = {"beta": 0.3, "loss_type": "ipo", "shift": False, "backend": target.backend}
    module = DPOLoss(**options)
    out = module(*arguments, cu_seqlens=problem.cu_seqlens)
    expected = dpo_kernels.dpo_loss(*arguments, cu_seqlens=problem.cu_seqlens, **options)
    assert_same_bits(out.loss, expected.loss)
    logits = problem.logits.detach()
    out = DPOLoss(backend=target.backend)(
        problem.logits,
        problem.labels,
        reference_logits=logits,
        cu_seqlens=problem.cu_seqlens,
    )
    assert out.losses.tolist() == pytest.approx([math.log(2)] * 2)
    assert repr(module) == (
        f"DPOLoss(beta=0.3, loss_type='ipo', shift=False, backend={target.backend!r})"
    )
    assert not list(module.parameters())


def test_module_takes_every_option_of_the_function():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(dpo_kernels.dpo_loss).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for name in ("cu_seqlens", "reference_logits"):
        del defaults[name]
    assert DPOLoss(**defaults).options == defaults


def test_reference_takes_what_the_functions_take():
    """A user swaps dpo_kernels.reference.f for dpo_kernels.f without changing the call."""
    extra = {"backend", "inplace_backward", "vocab_group", "sequence_group"}
    for name in ("token_logps", "token_stats", "sequence_logps", "preference_loss"):
        ours = set(inspect.signature(getattr(dpo_kernels, name)).parameters)
        theirs = set(inspect.signature(getattr(reference, name)).parameters)
        assert ours - extra <= theirs
