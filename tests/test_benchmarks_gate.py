"""No figure without parity: what the gate lets through, and the rows of what it does not."""

from __future__ import annotations

import functools

import pytest
import torch

from dpo_kernels import reference
from dpo_kernels.cli import runner
from dpo_kernels.cli.contenders import Contender, contenders_for, plain
from dpo_kernels.cli.gate import EXACT, FAST, Gate
from dpo_kernels.cli.problems import Shape, make_problem, ragged_lengths
from dpo_kernels.cli.rows import COLUMNS
from dpo_kernels.dispatch import available_backends

RAGGED = ragged_lengths(2, 12)
SHAPES = {
    "padded": Shape(2, 12, 301),
    "packed": Shape(2, 12, 301, lengths=RAGGED, packed=True),
    "bfloat16": Shape(2, 12, 301, lengths=RAGGED, dtype=torch.bfloat16),
    "ipo": Shape(2, 12, 301, lengths=RAGGED, loss_type="ipo"),
    "head": Shape(2, 12, 301, hidden=16),
    "frozen head": Shape(2, 12, 301, hidden=16, trainable_head=False),
    "reference hidden": Shape(2, 12, 301, hidden=16, reference_hidden=True),
    "softcap": Shape(2, 12, 301, hidden=16, softcap=4.0, dtype=torch.bfloat16),
}


def results(problem, loss=None):
    one = problem.trainable()
    value = (loss or plain(problem.shape))(one)
    gradients = torch.autograd.grad(value, list(one.inputs.values()))
    return value.detach(), dict(zip(one.inputs, gradients, strict=True))


@functools.cache
def case(name):
    problem = make_problem(SHAPES[name], "cpu")
    return problem, Gate(problem)


@pytest.mark.parametrize("name", SHAPES)
def test_the_truth_is_the_reference_in_float64(name):
    """Block by block gives what autograd gives on the whole problem."""
    problem, gate = case(name)
    doubled = {k: v.double() for k, v in problem.inputs.items()}
    if problem.weight is not None:
        doubled["weight"] = problem.weight.double()
    if problem.reference_hidden is not None:
        doubled["reference_hidden"] = problem.reference_hidden.double()
    whole = type(problem)(**{**vars(problem), **doubled})
    value, gradients = results(whole)
    assert gate.loss == pytest.approx(float(value), rel=1e-9)
    for check in gate.check(value, gradients, EXACT).values():
        assert check.ours < 1e-6


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("precision", [EXACT, FAST])
def test_plain_pytorch_passes(name, precision):
    problem, gate = case(name)
    assert all(check.passed for check in gate.check(*results(problem), precision).values())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("precision", [EXACT, FAST])
def test_a_wrong_loss_does_not(name, precision):
    problem, gate = case(name)
    value, gradients = results(problem)
    for wrong in (value * 1.5, value + float("nan")):
        checks = gate.check(wrong, gradients, precision)
        assert [quantity for quantity, check in checks.items() if not check.passed] == ["loss"]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("wrong", ["one row", "scale", "nan", "unscored"])
def test_a_wrong_gradient_does_not(name, wrong):
    problem, gate = case(name)
    value, gradients = results(problem)
    for quantity, gradient in gradients.items():
        broken = gradient.clone()
        rows = broken.view(-1, broken.shape[-1])
        norms = rows.double().norm(dim=-1)
        if wrong == "one row":
            rows[norms.argmax()] *= 1.3
        elif wrong == "scale":
            rows *= 1.3
        elif wrong == "nan":
            rows[norms.argmax(), 0] = float("nan")
        elif quantity == "weight":
            continue
        else:
            # a prompt's row, which must be zero
            rows[norms.argmin()] = rows[norms.argmax()]
        checks = gate.check(value, {**gradients, quantity: broken}, FAST)
        assert [name for name, check in checks.items() if not check.passed] == [quantity]


def test_a_logit_tile_in_bfloat16_is_fast_and_not_exact():
    shape = Shape(4, 256, 2048, hidden=64, dtype=torch.bfloat16, std=8.0, scored=1.0)
    problem = make_problem(shape, "cpu")
    gate = Gate(problem)
    # what plain PyTorch does in bfloat16, beside a plain that did it in float32
    gate._plain.loss = gate.loss
    gate._plain_errors = dict.fromkeys(gate._plain_errors, 0.0)
    found = results(problem)
    assert not gate.check(*found, EXACT)["loss"].passed
    assert gate.check(*found, FAST)["loss"].passed


def measured(shape, contenders, **options):
    rows = []
    runner.measure_shape(
        shape, contenders, "cpu", rows.append, benchmark="test", repetitions=3, **options
    )
    return rows


def broken(shape):
    loss = plain(shape)
    return lambda problem: loss(problem) * 1.01


def missing(shape):
    raise ImportError("No module named 'nobody'")


def unserved(shape):
    raise NotImplementedError("packed batches")


def exhausted(shape):
    def loss(problem):
        raise torch.OutOfMemoryError("CUDA out of memory")

    return loss


def faulty(shape):
    def loss(problem):
        raise TypeError("takes 3 positional arguments\nbut")

    return loss


@pytest.mark.parametrize(
    ("make", "status"),
    [
        (broken, "red: loss, logits out of bounds"),
        (missing, "missing: No module named 'nobody'"),
        (unserved, "not served: packed batches"),
        (exhausted, "out of memory"),
        (faulty, "failed: TypeError: takes 3 positional arguments"),
    ],
)
def test_who_has_no_figure_has_a_row_that_says_why(make, status):
    """And the others have theirs."""
    rows = measured(SHAPES["padded"], [Contender("peer", make), Contender("reference", plain)])
    peers = [row for row in rows if row["contender"] == "peer"]
    assert [row["mode"] for row in peers] == list(runner.MODES)
    assert {row["status"] for row in peers} == {status}
    assert all(not row["median_ms"] and not row["times_floor"] for row in peers)
    others = [row for row in rows if row["contender"] == "reference"]
    assert len(others) == 2
    for row in others:
        assert tuple(row) == COLUMNS
        assert row["status"] == "ok"
        assert float(row["times_floor"]) > 0
        assert float(row["gradient_error"]) <= float(row["gradient_bound"])


@pytest.mark.parametrize("name", SHAPES)
def test_ours_is_named_by_the_backend_and_has_figures(name):
    shape = SHAPES[name]
    # Triton's interpreter would take minutes
    backend = "cpu" if available_backends()["cpu"] is None else "torch"
    rows = measured(shape, contenders_for(shape, "cpu", backend=backend, compile=False))
    own = [row for row in rows if row["contender"].startswith("dpo_kernels, ")]
    assert own and {row["status"] for row in own} == {"ok"}
    assert own[0]["contender"] == f"dpo_kernels, {backend}"
    inplace = [row["mode"] for row in own].count(runner.INPLACE)
    assert inplace == (shape.hidden is None)


def test_in_place_is_timed_on_the_very_input_each_round():
    """Though a call overwrites it."""
    shape, seen = SHAPES["padded"], []

    def loss(problem):
        seen.append(problem.logits.detach().clone())
        value = (problem.logits * 2).sum()
        problem.logits.detach().zero_()
        return value

    problem = make_problem(shape, "cpu")
    contender = Contender("x", plain, inplace=True)
    timed = runner.timed_call(contender, runner.INPLACE, loss, runner.rotation(problem))
    for number in range(3):
        timed.setup(number)
        timed.run(number)
    assert len(seen) == 3
    assert all(torch.equal(logits, problem.logits) for logits in seen)


def test_an_interrupt_leaves_rows_of_the_rounds_that_were_timed():
    calls = []

    def make(shape):
        loss = plain(shape)

        def counted(problem):
            calls.append(0)
            # admitted once, then two modes and a warm-up round
            if len(calls) == 7:
                raise KeyboardInterrupt
            return loss(problem)

        return counted

    rows = []
    with pytest.raises(KeyboardInterrupt):
        runner.measure_shape(
            SHAPES["padded"],
            [Contender("peer", make)],
            "cpu",
            rows.append,
            benchmark="test",
            repetitions=50,
        )
    assert [row["repetitions"] for row in rows] == ["2", "1"]
    assert all(float(row["median_ms"]) > 0 for row in rows)


def test_floors_of_a_shape():
    shape = Shape(2, 10, 100, scored=0.5, dtype=torch.bfloat16)
    assert (shape.rows, shape.scored_tokens) == (40, 20)
    assert shape.floor_bytes(False) == 20 * 100 * 2
    assert shape.floor_bytes(True) == (2 * 20 + 40) * 100 * 2
    # the first token of a sequence is scored by no logit
    assert Shape(1, 10, 100, scored=1.0).scored_tokens == 18
    gemm = 2 * 20 * 8 * 100
    for trainable, given, gemms in ((True, False, 3), (False, False, 2), (True, True, 4)):
        head = Shape(2, 10, 100, hidden=8, trainable_head=trainable, reference_hidden=given)
        assert head.floor_flops(True) == gemms * gemm
        assert head.floor_flops(False) == (1 + given) * gemm


def test_the_reference_lies_a_few_nats_from_the_policy():
    """So that no pair is decided, and no gradient vanishes, before it is timed."""
    for name in SHAPES:
        problem, _ = case(name)
        if problem.reference_hidden is not None or problem.logits is None:
            continue
        logps = reference.sequence_logps(
            problem.logits, problem.labels, cu_seqlens=problem.cu_seqlens
        )
        assert (logps - problem.reference_logps).abs().max() < 20
