"""What PyTorch sees of a call: FLOPs, profiler ranges, and one compiled graph for any beta."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import dpo_kernels as dk
import dpo_kernels.flops
from tests.helpers import make_problem
from tests.linear_helpers import make_head


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ("eager", "inductor"))
@pytest.mark.parametrize("loss_type", ("sigmoid", "ipo", "hinge"))
def test_a_new_beta_does_not_compile_again(fresh_dynamo, loss_type, backend):
    """Twice at most: once for the first value, once for any. The kernels make the sigmoid loss of
    the first graph; the second makes it in PyTorch."""
    problem = make_problem()
    counter = CompileCounterWithBackend(backend)

    def loss(beta):
        return dk.dpo_loss(
            problem.logits, problem.labels, *problem.reference, beta=beta, loss_type=loss_type
        ).loss

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for beta in (0.1, 0.2, 0.3, 0.4, 0.5):
        results = [
            (out, *torch.autograd.grad(out, problem.logits)) for out in (compiled(beta), loss(beta))
        ]
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("loss_type", ("sigmoid", "ipo"))
def test_a_new_beta_of_a_frozen_head_does_not_compile_again(fresh_dynamo, loss_type):
    problem = make_head(frozen=True)
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def loss(beta):
        return dk.linear_dpo_loss(
            problem.hidden,
            problem.weight,
            problem.labels,
            *problem.reference_logps,
            beta=beta,
            loss_type=loss_type,
        ).loss

    for beta in (0.1, 0.2, 0.3, 0.4, 0.5):
        loss(beta)
    assert counter.frame_count <= 2


def test_the_profiler_names_our_operators():
    """Forward and backward, under the names of torch.ops.dpo_kernels."""
    problem, head = make_problem(), make_head()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dk.token_logps(problem.logits, problem.labels).sum().backward()
        dk.dpo_loss(problem.logits, problem.labels, *problem.reference).loss.backward()
        dk.linear_dpo_loss(
            head.hidden, head.weight, head.labels, *head.reference_logps
        ).loss.backward()
    names = {event.key for event in profile.key_averages()}
    ours = {"token_forward", "dpo_forward", "backward", "linear_dpo"}
    assert {f"dpo_kernels::{name}" for name in ours} <= names


def test_the_profiler_names_our_functions(monkeypatch):
    """A range around every public function's call, and none where no profiler runs."""
    problem, head = make_problem(), make_head()
    logits, hidden = (problem.logits, problem.labels), (head.hidden, head.weight, head.labels)
    calls = {
        dk.token_logps: logits,
        dk.token_stats: logits,
        dk.sequence_logps: logits,
        dk.dpo_loss: (*logits, *problem.reference),
        dk.preference_loss: (*problem.reference, *problem.reference),
        dk.linear_token_logps: hidden,
        dk.linear_token_stats: hidden,
        dk.linear_sequence_logps: hidden,
        dk.linear_dpo_loss: (*hidden, *head.reference_logps),
    }
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for function, arguments in calls.items():
            function(*arguments)
    names = {event.key for event in profile.key_averages()}
    assert {f"dpo_kernels.{function.__name__}" for function in calls} <= names
    public = {getattr(dk, name) for name in dk.__all__}
    assert set(calls) == {x for x in public if inspect.isfunction(x)} - {
        dk.available_backends,
        dk.patch,
    }

    def unasked(name):
        raise AssertionError(f"a range {name} without a profiler")

    monkeypatch.setattr(torch.profiler, "record_function", unasked)
    for function, arguments in calls.items():
        function(*arguments)


@pytest.mark.parametrize(
    "frozen, options, gemms",
    [
        (True, {}, 2),
        (False, {}, 3),
        (True, {"reference": True}, 3),
        (False, {"reference": True}, 4),
        # its derivatives come late: the logits are computed again
        (False, {"loss_type": "aot"}, 4),
    ],
)
def test_flops_are_those_of_the_gemms(frozen, options, gemms):
    """2 N D V each, N the scored rows."""
    head = make_head(frozen=frozen, bias=False)
    labels = head.labels.clone()
    labels[:, 0] = -100
    options, refs = dict(options), head.reference_logps
    if options.pop("reference", False):
        options, refs = {"reference_hidden": head.reference_hidden}, ()
    scored = int((labels != -100).sum())
    with FlopCounterMode(display=False) as counter:
        dk.linear_dpo_loss(head.hidden, head.weight, labels, *refs, **options).loss.backward()
    one = 2 * scored * head.hidden.shape[-1] * head.weight.shape[0]
    assert counter.get_total_flops() == gemms * one
