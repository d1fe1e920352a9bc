"""Random shapes, masks, strides and options against the reference; the same examples every run."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dpo_kernels
from tests.helpers import CPU, assert_rule, gradient_tolerance, logp_tolerance, make_problem
from tests.test_parity import check_pairs, check_tokens, gradient

# a fixture that poisons memory is set up once for all examples: it holds no state
FUZZ = settings(
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def problems(draw):
    """Sizes around the widths of vectors (8, 16), of their unrolled loops and of segments."""
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)))
    problem = make_problem(
        CPU,
        dtype,
        pairs=draw(st.integers(1, 4)),
        length=draw(st.integers(1, 9)),
        vocab=draw(st.one_of(st.integers(2, 70), st.sampled_from((127, 129, 1023, 4097, 8193)))),
        packed=draw(st.booleans()),
        scored=draw(st.sampled_from((0.0, 0.2, 0.7, 1.0))),
        seed=draw(st.integers(0, 2**16)),
    )
    logits = draw(strided(problem.logits.detach()))
    if draw(st.booleans()):
        logits.masked_fill_(torch.rand(logits.shape) < 0.2, -30.0)
    return problem.with_logits(logits)


@st.composite
def strided(draw, values):
    """``values`` with gaps after rows and sequences, perhaps with the two swapped in memory."""
    gaps = [draw(st.integers(0, 3)) for _ in range(values.dim())]
    sizes = [size + gap for size, gap in zip(values.shape, gaps, strict=True)]
    offset = draw(st.integers(0, 3))
    if values.dim() == 3 and draw(st.booleans()):
        sizes[0], sizes[1] = sizes[1], sizes[0]
        memory = values.new_full((math.prod(sizes) + offset,), math.nan)[offset:].view(sizes)
        view = memory.transpose(0, 1)
    else:
        view = values.new_full((math.prod(sizes) + offset,), math.nan)[offset:].view(sizes)
    view = view[tuple(slice(0, size) for size in values.shape)]
    return view.copy_(values)


@settings(FUZZ, max_examples=60)
@given(problem=problems(), shift=st.booleans())
def test_tokens(problem, shift):
    # token functions take a packed batch as one sequence
    problem.cu_seqlens = None
    check_tokens(CPU, problem, shift=shift)


@settings(FUZZ, max_examples=60)
@given(
    problem=problems(),
    options=st.fixed_dictionaries(
        {
            "shift": st.booleans(),
            "average_log_prob": st.booleans(),
            "label_smoothing": st.sampled_from((0.0, 0.2)),
            "reduction": st.sampled_from(("mean", "sum", "none")),
        }
    ),
)
def test_pairs(problem, options):
    check_pairs(CPU, problem, **options)


@settings(FUZZ, max_examples=30)
@given(problem=problems(), threads=st.integers(1, 5), inplace=st.booleans())
def test_bits(problem, threads, inplace):
    """Threads and in-place use change no bit of a gradient."""

    def loss(logits, **options):
        return dpo_kernels.dpo_loss(
            logits, problem.labels, *problem.reference, **problem.layout, backend="cpu", **options
        ).loss

    before = torch.get_num_threads()
    expected = gradient(problem, loss(problem.logits))
    try:
        torch.set_num_threads(threads)
        copy = problem.with_logits(problem.logits.detach().clone())
        assert torch.equal(gradient(copy, loss(copy.logits, inplace_backward=inplace)), expected)
    finally:
        torch.set_num_threads(before)


def test_the_rule_can_break():
    """A problem whose gradient or value is off by a few roundings is told from a right one."""
    truth = torch.linspace(-12, -0.1, 50, dtype=torch.float64)
    theirs = truth.float()
    tolerance = logp_tolerance(truth, torch.float32, 67)
    assert_rule("logps", theirs, theirs, truth, tolerance)
    for wrong in (theirs * 1.00001, theirs + 1e-4, theirs.bfloat16(), theirs.flip(0)):
        with pytest.raises(AssertionError, match="break the rule"):
            assert_rule("logps", wrong, theirs, truth, tolerance)
    with pytest.raises(AssertionError, match="break the rule"):
        assert_rule("logps", theirs.where(truth < -1, math.nan), theirs, truth, tolerance)
    tolerance = gradient_tolerance(truth, CPU, torch.float32, 67)
    for wrong in (theirs * 1.0001, theirs + 1e-3, theirs * 0):
        with pytest.raises(AssertionError, match="break the rule"):
            assert_rule("gradient", wrong, theirs, truth, tolerance)
