"""Random calls: shapes, layouts, strides, dtypes, default dtypes, magnitudes, masks, losses."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import dpo_kernels as dk
from tests.fuzz import oracle
from tests.fuzz.compare import (
    Pairs,
    check_logits_gradient,
    check_output,
    check_sequences,
    check_tokens,
    close,
    scored,
)
from tests.fuzz.heads import HeadProblem
from tests.fuzz.references import draw_reference
from tests.fuzz.strategies import (
    DTYPES,
    UNREFERENCED,
    batches,
    default_dtype,
    filled_in,
    loss_options,
    names_of,
    pair_options,
)

# 200 examples, the same every run; python -m tests.fuzz asks for others, and more of them
EXAMPLES = int(os.environ.get("DPO_KERNELS_FUZZ_EXAMPLES", "0"))


def fuzz(examples: int, share: float = 1.0):
    """``examples``: this property's part of the 200; ``share``: of EXAMPLES, for what is slow."""
    return settings(
        derandomize=not EXAMPLES,
        max_examples=int(share * EXAMPLES) or examples,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate] + [Phase.shrink] * bool(EXAMPLES),
        # a fixture that poisons memory is set up once for all examples: it holds no state
        suppress_health_check=list(HealthCheck),
    )


def assert_equal(a: torch.Tensor, b: torch.Tensor) -> None:
    """The same numbers; a NaN is a NaN."""
    assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


backends = st.sampled_from(("cpu", "cpu", "torch"))
defaults = st.sampled_from(DTYPES)


@fuzz(29)
@given(batch=batches(pairs=False), backend=backends, default=defaults)
def test_tokens(batch, backend, default):
    with default_dtype(default):
        check_tokens(batch, backend)


@fuzz(20)
@given(batch=batches(pairs=False), backend=backends, default=defaults, average=st.booleans())
def test_sequences(batch, backend, default, average):
    with default_dtype(default):
        check_sequences(batch, backend, average)


@fuzz(45)
@given(
    batch=batches(),
    backend=backends,
    default=defaults,
    loss=loss_options(),
    pair=pair_options,
    data=st.data(),
)
def test_dpo_loss(batch, backend, default, loss, pair, data):
    check_dpo_loss(batch, backend, default, loss, pair, data)


def check_dpo_loss(batch, backend, default, loss, pair, data) -> None:
    reference = draw_reference(data.draw, batch, loss, pair, None)
    truth = scored(batch)
    wanted = Pairs(truth, reference.logps, reference.error, loss, pair)
    assume(wanted.usable(loss))
    inplace = data.draw(st.booleans())
    logits = batch.x * 1 if inplace else batch.x
    with default_dtype(default):
        output = dk.dpo_loss(
            logits,
            batch.labels,
            **reference.keywords,
            cu_seqlens=batch.cu_seqlens,
            **batch.scoring,
            **loss,
            **pair,
            inplace_backward=inplace,
            backend=backend,
        )
        check_output(output, wanted, pair["reduction"])
        assume(wanted.sorted_apart(loss))
        (grad,) = torch.autograd.grad(output.loss.sum(), batch.x)
    check_logits_gradient(batch, truth, grad, wanted.derivatives, wanted.derivative_error)


@fuzz(6, share=0.1)
@given(
    batch=batches(dtypes=(torch.float32, torch.bfloat16, torch.float16), most=2),
    loss=loss_options(),
    pair=pair_options,
    data=st.data(),
)
def test_triton(batch, loss, pair, data):
    """The kernels in Triton's interpreter: tokens, and a loss with its gradient."""
    reason = dk.available_backends()["triton"]
    if reason is not None or torch.cuda.is_available():
        pytest.skip(reason or "Triton runs on the GPU here, not in its interpreter")
    if data.draw(st.booleans()):
        check_tokens(batch, "triton")
    else:
        check_dpo_loss(batch, "triton", torch.float32, loss, pair, data)


@fuzz(10)
@given(batch=batches(wild=False), backend=backends, loss=loss_options(), data=st.data())
def test_impossible_label(batch, backend, loss, data):
    """-inf at a scored label: its sequence's log-prob is -inf, and no other pair notices."""
    rows, pairs = scored(batch).rows, (len(batch.bounds) - 1) // 2
    # what couples pairs is another matter
    assume(not set(names_of(loss)) & {"aot", "aot_unpaired", "sft"})
    assume(batch.vocab > 1 and rows.tokens.numel())
    struck = data.draw(st.integers(0, rows.tokens.numel() - 1))
    # two clones, of the same strides
    clean, logits = batch.x.detach().clone(), batch.x.detach().clone()
    row, label = int(rows.rows[struck]), int(rows.labels[struck])
    place = (row,) if batch.cu_seqlens is not None else divmod(row, batch.labels.shape[1])
    logits[(*place, label)] = -torch.inf
    options = {"cu_seqlens": batch.cu_seqlens, "reduction": "sum", "backend": backend}
    options |= {"reference_free": not set(names_of(loss)) <= set(UNREFERENCED)}
    results = []
    for x in (clean.requires_grad_(), logits.requires_grad_()):
        output = dk.dpo_loss(x, batch.labels, **options, **loss, **batch.scoring)
        logps = torch.cat((output.chosen_logps, output.rejected_logps))
        results.append((logps, output.losses, torch.autograd.grad(output.loss, x)[0]))
    sequence = int(rows.sequence[struck])
    logps, wanted = results[1][0], results[0][0].clone()
    wanted[sequence] = -torch.inf
    assert torch.equal(logps, wanted)
    others = torch.arange(pairs) != sequence % pairs
    assert_equal(results[1][1][others], results[0][1][others])
    theirs, ours = (x[2].reshape(-1, batch.vocab) for x in results)
    of_row = torch.zeros(ours.shape[0], dtype=torch.int64)
    for s, (start, end) in enumerate(pairwise(batch.bounds)):
        of_row[start:end] = s % pairs
    elsewhere = of_row != sequence % pairs
    assert_equal(ours[elsewhere], theirs[elsewhere])


HEAD_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@fuzz(35)
@given(
    batch=batches(dtypes=HEAD_DTYPES, width=12, wild=False),
    backend=backends,
    default=defaults,
    loss=loss_options(),
    pair=pair_options,
    data=st.data(),
)
def test_linear_dpo_loss(batch, backend, default, loss, pair, data):
    """Frozen and trainable heads, with bias, scale and softcap, in one tile or many."""
    problem = HeadProblem(batch, data.draw, backend)
    weight, truth, head = problem.weight, problem.truth, problem.options
    reference = draw_reference(data.draw, batch, loss, pair, problem)
    wanted = Pairs(truth, reference.logps, reference.error, loss, pair)
    assume(wanted.usable(loss))
    with default_dtype(default):
        output = dk.linear_dpo_loss(
            batch.x,
            weight,
            batch.labels,
            **reference.keywords,
            **head,
            cu_seqlens=batch.cu_seqlens,
            **batch.scoring,
            **loss,
            **pair,
        )
        check_output(output, wanted, pair["reduction"])
        assume(wanted.sorted_apart(loss))
        grads = torch.autograd.grad(output.loss.sum(), problem.leaves)
    problem.check_gradients(grads, wanted.derivatives, wanted.derivative_error)


@fuzz(25)
@given(
    batch=batches(dtypes=HEAD_DTYPES, width=12, wild=False, pairs=False),
    backend=backends,
    default=defaults,
    average=st.booleans(),
    data=st.data(),
)
def test_linear_tokens_and_sequences(batch, backend, default, average, data):
    """linear_token_logps, linear_token_stats and linear_sequence_logps; their stats and slopes."""
    problem = HeadProblem(batch, data.draw, backend)
    sequences = batch.cu_seqlens is not None or data.draw(st.booleans())
    if not sequences:
        check_linear_tokens(batch, problem, default)
        return
    options = {**problem.options, **batch.scoring, "cu_seqlens": batch.cu_seqlens}
    truth, rows = problem.truth, problem.truth.rows
    with default_dtype(default):
        logps = dk.linear_sequence_logps(
            batch.x, problem.weight, batch.labels, average_log_prob=average, **options
        )
    sums = oracle.per_sequence(truth.tokens, rows, average)
    error = oracle.per_sequence(truth.error, rows, average) + 8 * truth.eps * sums.abs()
    close("sequence_logps", logps, sums, error)
    upstream = torch.linspace(-1, 1, logps.shape[0], dtype=logps.dtype)
    slopes = upstream.double()[rows.sequence]
    slopes = slopes / rows.lengths[rows.sequence] if average else slopes
    grads = torch.autograd.grad(logps, problem.leaves, upstream)
    problem.check_gradients(grads, slopes, truth.eps * 4 * slopes.abs())


def check_linear_tokens(batch, problem, default) -> None:
    truth, options = problem.truth, {**problem.options, **batch.scoring}
    arguments = (batch.x, problem.weight, batch.labels)
    with default_dtype(default):
        stats = dk.linear_token_stats(*arguments, **options)
        logps = dk.linear_token_logps(*arguments, **options)
    assert torch.equal(stats.logps, logps)
    close("logps", logps, truth.dense(truth.tokens, logps), truth.dense(truth.error, logps))
    upstream = torch.linspace(-1, 2, logps.numel(), dtype=logps.dtype).view(logps.shape)
    slopes = upstream.double().flatten()[truth.rows.tokens]
    grads = torch.autograd.grad(logps, problem.leaves, upstream)
    problem.check_gradients(grads, slopes, torch.zeros_like(slopes))


LENGTHS = ("ipo", "sigmoid_norm", "simpo", "sft")


@fuzz(20)
@given(
    loss=loss_options(),
    pairs=st.integers(0, 5),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    default=defaults,
    spread=st.sampled_from((0.0, 0.1, 3.0, 30.0)),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_preference_loss(loss, pairs, dtype, default, spread, seed, data):
    """Losses and slopes from log-probs, of sums with lengths or of means."""
    rng = torch.Generator().manual_seed(seed)
    logps, refs = (
        (spread * torch.randn(2 * pairs, generator=rng, dtype=torch.float64) - 9).to(dtype)
        for _ in range(2)
    )
    means = not set(names_of(loss)) & set(LENGTHS) or data.draw(st.booleans())
    lengths = torch.randint(0, 9, (2 * pairs,), generator=rng)
    given_lengths = {}
    if not means:
        chosen, rejected = lengths.chunk(2)
        given_lengths = {"chosen_lengths": chosen, "rejected_lengths": rejected}
    options, eps = filled_in(loss, means), torch.finfo(dtype).eps

    def losses(x):
        return oracle.pair_losses(x, refs.double(), lengths, options)

    def slopes(x):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(losses(leaf).sum(), leaf)[0] if pairs else torch.zeros_like(x)

    centre = logps.double()
    half = 1 / (2 * options["beta"])
    error = 8 * eps * (1 + half + centre.abs() + refs.double().abs())
    wanted, slope = losses(centre), slopes(centre)
    exponential = loss.get("f_divergence") in ("forward_kl", "alpha_divergence")
    ratios = centre - refs.double()
    assume(not pairs or ratios.abs().max() < (40 if exponential else 1e4))
    assume(not pairs or wanted.abs().max() < 1e25)
    if pairs and set(names_of(loss)) & {"aot", "aot_unpaired"}:
        values = (*ratios.chunk(2), *centre.chunk(2), ratios.view(2, -1).diff(dim=0)[0])
        assume(all((x.sort().values.diff() > 1e-2).all() for x in values))
    leaf = logps.clone().requires_grad_()
    with default_dtype(default):
        ours, *rewards = dk.preference_loss(*leaf.chunk(2), *refs.chunk(2), **loss, **given_lengths)
        (grad,) = torch.autograd.grad(ours.sum(), leaf) if pairs else (torch.zeros_like(leaf),)
    moved = 2 * oracle.spread_over_corners(losses, centre, error) if pairs else torch.zeros(0)
    close("losses", ours, wanted, moved + 64 * eps * (1 + wanted.abs()))
    close("rewards", torch.cat(rewards), options["beta"] * ratios, options["beta"] * error)
    # the terms of a slope round to eps, whatever is left of their sum
    terms = options["beta"] * oracle.steepness(ratios, options)
    moved = 2 * oracle.spread_over_corners(slopes, centre, error) if pairs else torch.zeros(0)
    close("slopes", grad, slope, moved + 16 * eps * (slope.abs() + terms))


@fuzz(10)
@given(batch=batches(), threads=st.integers(1, 4), loss=loss_options(), inplace=st.booleans())
def test_bits(batch, threads, loss, inplace):
    """Threads, in-place use and the memory that logits lie in change no bit."""
    before = torch.get_num_threads()
    free = not set(names_of(loss)) <= set(UNREFERENCED)

    def gradient(x, inplace):
        x = x.detach().requires_grad_()
        out = dk.dpo_loss(
            x * 1 if inplace else x,
            batch.labels,
            cu_seqlens=batch.cu_seqlens,
            reference_free=free,
            inplace_backward=inplace,
            backend="cpu",
            **batch.scoring,
            **loss,
        )
        return out.losses, torch.autograd.grad(out.loss, x)[0]

    expected = gradient(batch.x, False)
    try:
        torch.set_num_threads(threads)
        for x in (batch.x, batch.x.contiguous()):
            for ours, wanted in zip(gradient(x, inplace), expected, strict=True):
                assert_equal(ours, wanted)
    finally:
        torch.set_num_threads(before)
