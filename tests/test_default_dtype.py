"""No result depends on torch.set_default_dtype: values, dtypes and gradients, bit for bit."""

from __future__ import annotations

import pytest
import torch

import dpo_kernels as dk
from tests.fuzz.strategies import LOSSES, default_dtype
from tests.helpers import make_problem
from tests.linear_helpers import make_head

OTHERS = (torch.float64, torch.bfloat16, torch.float16)
# what makes constants of its own, beside plain losses
OPTIONS = {
    "ld_alpha": {"ld_alpha": 0.1},
    "ld_alpha of means": {"ld_alpha": 0.1, "average_log_prob": True},
    "use_weighting": {"use_weighting": True},
    "average": {"average_log_prob": True},
    "temperature": {"temperature": 0.7},
    "none": {"reduction": "none"},
    "js": {"f_divergence": "js_divergence"},
    "mix": {"loss_type": ["sigmoid", "ipo"], "loss_weights": [0.3, 0.7]},
    "callable": {"loss_type": lambda c, r: torch.nn.functional.softplus(r - c)},
}
for _name in LOSSES:
    OPTIONS[_name] = {"loss_type": _name, "label_smoothing": 0.1 if _name == "exo_pair" else 0.0}

defaults = pytest.mark.parametrize("default", OTHERS, ids=lambda x: str(x).split(".")[1])
backends = pytest.mark.parametrize("backend", ("cpu", "torch"))


@pytest.fixture(autouse=True)
def one_thread(threads):
    # small problems: threads would only wait for each other
    threads(1)


def outputs(output: dk.DPOOutput) -> list:
    return [*vars(output).values(), *output.metrics().values()]


def assert_same(run, default: torch.dtype) -> None:
    expected = run()
    with default_dtype(default):
        made = run()
    assert len(made) == len(expected) > 0
    for a, b in zip(made, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@defaults
@backends
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("name", OPTIONS)
def test_from_logits(default, backend, dtype, name):
    problem = make_problem(dtype=dtype, packed=name == "ld_alpha of means", length=6)

    def run():
        output = dk.dpo_loss(
            problem.logits,
            problem.labels,
            *problem.reference,
            **problem.layout,
            **OPTIONS[name],
            backend=backend,
        )
        return [*outputs(output), *torch.autograd.grad(output.loss.sum(), problem.logits)]

    assert_same(run, default)


@defaults
@pytest.mark.parametrize("frozen", (False, True), ids=("trainable", "frozen"))
@pytest.mark.parametrize("name", OPTIONS)
def test_from_hidden_states(default, frozen, name):
    problem = make_head(frozen=frozen, packed=name == "ld_alpha of means")

    def run():
        output = dk.linear_dpo_loss(
            problem.hidden,
            problem.weight,
            problem.labels,
            *problem.reference_logps,
            **problem.head,
            **OPTIONS[name],
        )
        return [*outputs(output), *torch.autograd.grad(output.loss.sum(), problem.trainable)]

    assert_same(run, default)


@defaults
@backends
def test_of_tokens_and_sequences(default, backend):
    problem, head = make_problem(), make_head()
    options = {"backend": backend}

    def run():
        stats = dk.token_stats(problem.logits, problem.labels, **options)
        sums = dk.sequence_logps(problem.logits, problem.labels, **options)
        of_head = dk.linear_token_stats(head.hidden, head.weight, head.labels, **options)
        return [*stats, sums, *of_head]

    assert_same(run, default)


@defaults
@pytest.mark.parametrize("name", LOSSES)
def test_of_log_probs(default, name):
    logps = torch.linspace(-9, -1, 16).view(4, 4)
    options = {"loss_type": name, "label_smoothing": 0.1 if name == "exo_pair" else 0.0}
    assert_same(lambda: dk.preference_loss(*logps, **options), default)
