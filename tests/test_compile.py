"""torch.compile: forward and backward in one graph each, equal to eager."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import dpo_kernels
from tests.entries import make_entry, sources
from tests.helpers import make_problem
from tests.linear_helpers import make_head
from tests.test_parity import gradient


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# (function, options): what is compiled, all of it with a scalar loss on top
CASES = {
    "sigmoid": ("dpo_loss", {}),
    "ipo": ("dpo_loss", {"loss_type": "ipo"}),
    "none": ("dpo_loss", {"reduction": "none", "label_smoothing": 0.1}),
    "mix": ("dpo_loss", {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]}),
    "callable": ("dpo_loss", {"loss_type": lambda c, r: (c - r - 1).square()}),
    "ld wpo": ("dpo_loss", {"ld_alpha": 0.5, "use_weighting": True}),
    "sequence_logps": ("sequence_logps", {}),
    "token_logps": ("token_logps", {}),
    "token_stats": ("token_stats", {}),
}


def outputs(entry, case: str) -> tuple[torch.Tensor, ...]:
    function, options = CASES[case]
    # something before the call and after it, so that the call is inside of the graph
    entry = replace(entry, inputs=(entry.inputs[0] * 1.5, *entry.inputs[1:]))
    out = getattr(entry, function)(**options)
    if function == "dpo_loss":
        return out.loss.sum(), out.chosen_rewards, *out.metrics().values()
    if function == "token_stats":
        return out.logps.square().mean() + out.entropy.mean(), out.mean_logits
    return (out.square().sum(),)


@pytest.mark.parametrize(
    ("packed", "case", "backend"),
    [
        *((False, case, "cpu") for case in CASES),
        *((True, case, "cpu") for case in ("sigmoid", "ld wpo", "sequence_logps")),
        (True, "sigmoid", "torch"),
    ],
)
@sources
def test_fullgraph(source, packed, case, backend):
    """Over batches of growing length and number, as they come in training.

    At most one recompilation, from the first static shapes to dynamic ones; more would be one a
    sequence length.
    """
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(outputs, fullgraph=True, backend=counter)
    for n in range(3):
        entry = make_entry(source, pairs=2 + n, length=3 + n, vocab=11, packed=packed, seed=n)
        entry.backend = backend
        got, want = compiled(entry, case), outputs(entry, case)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        grads = entry.gradients(got[0]), entry.gradients(want[0])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("loss_type", ("sigmoid", "ipo"))
def test_dynamic(loss_type):
    """dynamic=True makes symbols of floats too, beta among them."""

    def loss(logits, labels, chosen, rejected, beta):
        return dpo_kernels.dpo_loss(
            logits, labels, chosen, rejected, beta=beta, loss_type=loss_type, backend="cpu"
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for pairs, length, beta in ((2, 4, 0.1), (3, 6, 0.3)):
        problem = make_problem(pairs=pairs, length=length, vocab=11)
        arguments = (problem.logits, problem.labels, *problem.reference, beta)
        out, expected = compiled(*arguments), loss(*arguments)
        assert torch.allclose(out, expected)
        assert torch.allclose(gradient(problem, out), gradient(problem, expected))


def test_in_place():
    """The head is inside the graph, as in a compiled trainer; the gradient is that of eager."""
    problem = make_problem(vocab=11)
    weight = torch.randn(11, 6, requires_grad=True)
    hidden = torch.randn(4, 4, 6)

    def loss(hidden, labels, chosen, rejected):
        logits = hidden @ weight.t()
        return dpo_kernels.dpo_loss(
            logits, labels, chosen, rejected, inplace_backward=True, backend="cpu"
        ).loss

    arguments = (hidden, problem.labels, *problem.reference)
    out = torch.compile(loss, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.allclose(out, loss(*arguments))
    grads = [torch.autograd.grad(x, weight)[0] for x in (out, loss(*arguments))]
    assert torch.allclose(*grads, atol=1e-6)


def test_inductor():
    """Once through code generation, with a loss on top that inductor writes itself."""
    problem = make_problem(vocab=11)

    def loss(logits, labels, chosen, rejected):
        return dpo_kernels.dpo_loss(
            logits * 2.0, labels, chosen, rejected, loss_type="hinge", backend="cpu"
        ).loss

    arguments = (problem.logits, problem.labels, *problem.reference)
    out, expected = torch.compile(loss, fullgraph=True)(*arguments), loss(*arguments)
    assert torch.allclose(out, expected, rtol=1e-6)
    assert torch.allclose(gradient(problem, out), gradient(problem, expected), atol=1e-7)


def test_gradients_have_the_strides_their_fakes_promise():
    """A weight stored [D, V] and transposed: inductor stops at other strides than the fake's."""
    problem = make_head(bias=False)
    stored = problem.weight.detach().t().contiguous().requires_grad_()

    def loss(hidden, stored):
        return dpo_kernels.linear_dpo_loss(
            hidden, stored.t(), problem.labels, *problem.reference_logps
        ).loss

    got = torch.autograd.grad(
        torch.compile(loss, fullgraph=True)(problem.hidden, stored), (problem.hidden, stored)
    )
    want = torch.autograd.grad(loss(problem.hidden, stored), (problem.hidden, stored))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
