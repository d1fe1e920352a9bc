"""Every backend, dtype and layout against float64, values and gradients, by helpers.py's rule."""

from __future__ import annotations

import pytest
import torch

import dpo_kernels
from dpo_kernels import reference
from tests.helpers import (
    DTYPES,
    LAYOUTS,
    Problem,
    acc_eps,
    assert_rule,
    gradient_tolerance,
    logp_tolerance,
    make_problem,
    scored_rows,
    skip_if_refused,
    stats_tolerances,
)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
layouts = pytest.mark.parametrize("layout", LAYOUTS)
packings = pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))


def gradient(problem: Problem, output, grad_output=None):
    return torch.autograd.grad(output, problem.logits, grad_output)[0]


def check_gradient(target, problem, ours, theirs, truth, shift, c_error=0.0) -> None:
    """The rule, and exact zeros in every row that scores nothing."""
    dtype = problem.logits.dtype
    assert ours.dtype == dtype
    scored = scored_rows(problem, shift)
    tolerance = gradient_tolerance(truth, target, dtype, problem.vocab, c_error)
    # the reference's gradient of rows it does not score is NaN where those rows are
    assert_rule("gradient", ours[scored], theirs[scored], truth[scored], tolerance[scored])
    assert not ours[~scored].any()


def check_tokens(target, problem: Problem, **options) -> None:
    """token_stats and the gradient of its logps under a random grad_output."""
    wide, dtype = problem.double(), problem.logits.dtype
    ours = dpo_kernels.token_stats(
        problem.logits, problem.labels, backend=target.backend, **options
    )
    theirs = reference.token_stats(problem.logits, problem.labels, **options)
    truth = reference.token_stats(wide.logits, problem.labels, **options)

    z = wide.logits.detach() / options.get("temperature", 1.0)
    z_max = z.abs().nan_to_num(0.0).max().item() if "temperature" in options else 0.0
    scored = problem.labels != -100
    if options.get("shift"):
        scored[..., 0] = False
        z = z.roll(1, dims=-2)
    tolerances = stats_tolerances(truth, dtype, problem.vocab, z.abs().mean(-1))
    tolerances["logps"] = logp_tolerance(truth.logps, dtype, problem.vocab, z_max)
    for name, tolerance in tolerances.items():
        values = [getattr(stats, name) for stats in (ours, theirs, truth)]
        assert values[0].dtype == torch.promote_types(dtype, torch.float32)
        assert_rule(name, *(x[scored] for x in values), tolerance[scored])
        assert not values[0][~scored].any()
    assert ours.is_top1.dtype == torch.bool
    # float64 breaks no tie of these inputs: every dtype here is exact in float64
    assert torch.equal(ours.is_top1, truth.is_top1)

    alone = dpo_kernels.token_logps(
        problem.logits, problem.labels, backend=target.backend, **options
    )
    tolerance = tolerances["logps"]
    assert_rule(
        "token_logps", *(x[scored] for x in (alone, theirs.logps, truth.logps)), tolerance[scored]
    )
    grad_output = torch.randn_like(truth.logps)
    grads = [
        gradient(p, out, grad_output.to(out.dtype))
        for p, out in ((problem, alone), (problem, theirs.logps), (wide, truth.logps))
    ]
    # grad_output itself was rounded to the dtype of the results
    c_error = acc_eps(dtype) * (1 + 4 * z_max)
    check_gradient(target, problem, *grads, options.get("shift", False), c_error)


def sequence_errors(problem: Problem, dtype, **options) -> torch.Tensor:
    """How far each sequence's log-prob may be off: as its tokens, and n eps |sum| for adding."""
    tokens = reference.token_logps(problem.logits.double(), problem.labels, **options).detach()
    each = logp_tolerance(tokens, dtype, problem.vocab) * (tokens != 0)
    sums = reference.sums_per_sequence(each, problem.cu_seqlens)
    counts = reference.sums_per_sequence((tokens != 0).double(), problem.cu_seqlens)
    total = reference.sums_per_sequence(tokens, problem.cu_seqlens).abs()
    return sums + acc_eps(dtype) * (counts + 1) * total


def check_sequences(target, problem: Problem, *, average: bool, shift: bool) -> None:
    wide, dtype = problem.double(), problem.logits.dtype
    options = {"shift": shift, **problem.layout}
    arguments = {"average_log_prob": average, **options}
    ours = dpo_kernels.sequence_logps(
        problem.logits, problem.labels, backend=target.backend, **arguments
    )
    theirs = reference.sequence_logps(problem.logits, problem.labels, **arguments)
    truth = reference.sequence_logps(wide.logits, problem.labels, **arguments)
    assert ours.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = sequence_errors(problem, dtype, **options)
    assert_rule("sequence_logps", ours, theirs, truth, tolerance)
    grad_output = torch.randn_like(truth)
    grads = [
        gradient(p, out, grad_output.to(out.dtype))
        for p, out in ((problem, ours), (problem, theirs), (wide, truth))
    ]
    check_gradient(target, problem, *grads, shift, 2 * acc_eps(dtype))


def check_pairs(target, problem: Problem, **options) -> None:
    """dpo_loss: loss, losses, log-probs, rewards and the gradient."""
    wide, dtype, e = problem.double(), problem.logits.dtype, acc_eps(problem.logits.dtype)
    options = {"beta": 0.3, **problem.layout, **options}
    ours = dpo_kernels.dpo_loss(
        problem.logits, problem.labels, *problem.reference, backend=target.backend, **options
    )
    theirs = reference.dpo_loss(problem.logits, problem.labels, *problem.reference, **options)
    truth = reference.dpo_loss(wide.logits, wide.labels, *wide.reference, **options)

    shift = options.get("shift", True)
    chosen, rejected = sequence_errors(problem, dtype, shift=shift, **problem.layout).chunk(2)
    beta = options["beta"]
    # rounding the log-ratio and the product with beta costs 2 eps of each of their terms
    chosen_rewards = beta * (chosen + 2 * e * (truth.chosen_logps.abs() + wide.reference[0].abs()))
    rejected_rewards = beta * (
        rejected + 2 * e * (truth.rejected_logps.abs() + wide.reference[1].abs())
    )
    # a sigmoid loss has derivative at most 1; ipo is (m - 1/2b)^2, of derivative 2 sqrt(loss) in m
    derivative = 1.0
    if options.get("loss_type") == "ipo":
        derivative = 2 * truth.losses.sqrt() / beta
    losses = derivative * (chosen_rewards + rejected_rewards) + 8 * e * (1 + truth.losses.abs())
    tolerances = {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "chosen_rewards": chosen_rewards,
        "rejected_rewards": rejected_rewards,
        "losses": losses,
        "loss": losses if options.get("reduction") == "none" else losses.sum(),
    }
    for name, tolerance in tolerances.items():
        values = [getattr(out, name) for out in (ours, theirs, truth)]
        assert values[0].dtype == torch.promote_types(dtype, torch.float32)
        assert values[0].requires_grad == (name == "loss")
        assert_rule(name, *values, tolerance)

    grad_output = torch.randn_like(truth.loss) + 2
    grads = [
        gradient(p, out.loss, grad_output.to(out.loss.dtype))
        for p, out in ((problem, ours), (problem, theirs), (wide, truth))
    ]
    # c is the loss's derivative: as far off, relatively, as the logit beta D is in absolute terms;
    # that of ipo as m is relative to m - 1/2b
    c_error = (chosen_rewards + rejected_rewards).max().item() + 8 * e
    if options.get("loss_type") == "ipo":
        c_error = c_error / (beta * truth.losses.sqrt().min().item()) + 8 * e
    check_gradient(target, problem, *grads, shift, c_error)


@layouts
@packings
@dtypes
def test_tokens(target, dtype, packed, layout):
    skip_if_refused(target, dtype)
    problem = make_problem(target, dtype, packed=packed, layout=layout)
    check_tokens(target, problem)


@layouts
@packings
@dtypes
def test_sequences(target, dtype, packed, layout):
    skip_if_refused(target, dtype)
    problem = make_problem(target, dtype, packed=packed, layout=layout, seed=1)
    check_sequences(target, problem, average=False, shift=True)
    check_sequences(target, problem, average=True, shift=False)


@layouts
@packings
@dtypes
def test_pairs(target, dtype, packed, layout):
    skip_if_refused(target, dtype)
    problem = make_problem(target, dtype, packed=packed, layout=layout, seed=2)
    check_pairs(target, problem)
    check_pairs(target, problem, reduction="none", label_smoothing=0.1, shift=False)
    if dtype == torch.float32:
        # made from losses.py on top of the kernels of test_sequences
        check_pairs(target, problem, loss_type="ipo", reduction="sum")


@pytest.mark.parametrize(
    "options",
    (
        {"average_log_prob": True},
        {"reduction": "sum", "label_smoothing": 0.3},
        {"shift": False},
    ),
    ids=str,
)
@packings
def test_pair_options(target, packed, options):
    check_pairs(target, make_problem(target, pairs=3, packed=packed, seed=3), **options)


@pytest.mark.parametrize("temperature", (0.7, 2.5))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_temperature_and_shift_of_tokens(target, dtype, temperature):
    problem = make_problem(target, dtype, seed=4)
    check_tokens(target, problem, shift=True)
    check_tokens(target, problem, temperature=temperature, shift=True)


# 1: one class, probability 1. 7: less than any vector. 1000: whole 8-lane vectors but no power of
# two. 32001: Llama 2 with one token added, odd, so that rows lose their alignment. 50257: GPT-2, a
# prime, larger than any block or segment
ODD_VOCABS = (1, 7, 1000, 32001, 50257)


@pytest.mark.parametrize("vocab", ODD_VOCABS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_odd_vocabularies(target, dtype, vocab):
    problem = make_problem(target, dtype, pairs=1, length=3, vocab=vocab, scored=1.0, seed=vocab)
    check_tokens(target, problem)
    check_pairs(target, problem)


@pytest.mark.parametrize("vocab", (5, 50257))
def test_first_and_last_class(target, vocab):
    problem = make_problem(target, pairs=1, length=4, vocab=vocab, scored=1.0, seed=5)
    problem.labels[:, 0::2] = 0
    problem.labels[:, 1::2] = vocab - 1
    check_tokens(target, problem)


@pytest.mark.parametrize("position", (1, 3))
def test_one_scored_token(target, position):
    """Of a batch of two pairs; the other three sequences are all masked."""
    problem = make_problem(target, scored=1.0, seed=6)
    kept = problem.labels[2, position].item()
    problem.labels.fill_(-100)
    problem.labels[2, position] = kept
    check_tokens(target, problem)
    check_sequences(target, problem, average=True, shift=True)
    check_pairs(target, problem)


@packings
def test_empty_and_one_token_sequences(target, packed):
    """With shift, sequences of 0 or 1 tokens score nothing."""
    problem = make_problem(target, length=1, scored=1.0, packed=packed, seed=7)
    check_pairs(target, problem)
    if packed:
        problem = make_problem(target, length=4, scored=1.0, packed=True, seed=7)
        # sequences 1 and 3 become empty, their rows go to sequences 0 and 2
        problem.cu_seqlens[1] = problem.cu_seqlens[2]
        problem.cu_seqlens[3] = problem.cu_seqlens[4]
        check_sequences(target, problem, average=True, shift=True)
        check_pairs(target, problem)


def test_many_sequences_and_long_ones(target):
    """More of each than the 128 lanes with which a last block adds up, and no multiple of them.

    The long sums are of bfloat16 logits: the tolerance has room for float32 sums only.
    """
    check_pairs(target, make_problem(target, pairs=70, length=1, vocab=3, seed=8), shift=False)
    check_pairs(target, make_problem(target, torch.bfloat16, pairs=1, length=141, vocab=3, seed=9))


# more than the 65535 blocks that the second and third axis of a CUDA grid can have
LONG = 65_537


def test_long_sequences(target):
    if target.backend == "triton" and target.device == "cpu":
        pytest.skip("the interpreter needs minutes for 131074 programs and has no grid limit")
    problem = make_problem(target, pairs=1, length=LONG, vocab=3, scored=0.5, seed=10)
    check_pairs(target, problem, beta=0.001)
    last = problem.labels.clone()
    last[:, :-1] = -100
    last[:, -1] = 2
    ours = dpo_kernels.token_logps(problem.logits, last, backend=target.backend)
    truth = reference.token_logps(problem.logits.double(), last)
    assert ours[:, -1].cpu().tolist() == pytest.approx(truth[:, -1].cpu().tolist(), abs=1e-6)
