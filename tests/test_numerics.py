"""Inputs that break careless kernels: large offsets, confident tokens, many of them, nothing."""

from __future__ import annotations

import math

import pytest
import torch

import dpo_kernels
from dpo_kernels import reference
from tests.helpers import (
    acc_eps,
    assert_same_bits,
    eps,
    laid_out,
    make_problem,
    mem_available,
)
from tests.test_parity import check_pairs, check_tokens, gradient

float_dtypes = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16), ids=("float32", "bfloat16", "float16")
)


@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
def test_unscored_rows_are_not_read(target, packed):
    """NaN in rows that score nothing reaches neither the loss nor any gradient."""
    problem = make_problem(target, length=6, packed=packed, scored=0.5)
    clean = dpo_kernels.dpo_loss(
        problem.logits, problem.labels, *problem.reference, **problem.layout, backend=target.backend
    )
    expected = gradient(problem, clean.loss)
    labels = reference.scored_labels(problem.labels, shift=True, cu_seqlens=problem.cu_seqlens)
    unscored = torch.nn.functional.pad(labels[..., 1:] == -100, (0, 1), value=True)
    dirty = problem.with_logits(problem.logits.masked_fill(unscored.unsqueeze(-1), math.nan))
    out = dpo_kernels.dpo_loss(
        dirty.logits, dirty.labels, *dirty.reference, **dirty.layout, backend=target.backend
    )
    assert_same_bits(out.losses, clean.losses)
    assert_same_bits(gradient(dirty, out.loss), expected)


@pytest.mark.parametrize("average", (False, True))
def test_all_masked(target, average):
    """No scored token anywhere: log-probs 0, loss ln 2, gradient 0, even from NaN logits."""
    problem = make_problem(target)
    problem.labels.fill_(-100)
    dirty = problem.with_logits(torch.full_like(problem.logits, math.nan))
    zeros = torch.zeros(2, device=target.device)
    out = dpo_kernels.dpo_loss(
        dirty.logits, dirty.labels, zeros, zeros, average_log_prob=average, backend=target.backend
    )
    assert not out.chosen_logps.any() and not out.rejected_logps.any()
    assert out.loss.item() == pytest.approx(math.log(2), rel=2 * acc_eps(torch.float32))
    assert not gradient(dirty, out.loss).any()
    stats = dpo_kernels.token_stats(dirty.logits, dirty.labels, backend=target.backend)
    assert not any(value.any() for value in stats)


@pytest.mark.parametrize("loss_type", ("sigmoid", "ipo", "sigmoid_norm", "simpo", "sft"))
def test_one_all_masked_sequence(target, loss_type):
    """Its mean log-prob is 0 / max(0, 1), its gradient 0; the others are as ever."""
    problem = make_problem(target)
    problem.labels[3] = -100
    refs = () if loss_type in ("simpo", "sft") else problem.reference
    out = dpo_kernels.dpo_loss(
        problem.logits, problem.labels, *refs, loss_type=loss_type, backend=target.backend
    )
    truth = reference.dpo_loss(problem.logits.double(), problem.labels, *refs, loss_type=loss_type)
    assert out.losses.tolist() == pytest.approx(truth.losses.tolist(), rel=1e-5)
    grad = gradient(problem, out.loss)
    assert grad.isfinite().all() and grad[0].any() and not grad[3].any()


@pytest.mark.parametrize("loss_type", ("sigmoid", "ipo", "aot", "sft"))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
# [0, T, V]; [2, 0, V]: pairs of empty answers; packed: no pair, and one pair of empty answers
@pytest.mark.parametrize("shape", ((0, 4), (0, 0), (2, 0), (0,), (1, 0)), ids=str)
def test_empty_batches(target, shape, loss_type, reduction):
    """A differentiable 0 without pairs, the loss of equal log-probs without tokens."""
    cu_seqlens = None
    if len(shape) == 1 or shape == (1, 0):
        num_seqs = 2 * shape[0] if len(shape) == 2 else 0
        cu_seqlens = torch.zeros(num_seqs + 1, dtype=torch.int64, device=target.device)
        shape = (0,)
    pairs = (len(cu_seqlens) - 1 if cu_seqlens is not None else shape[0]) // 2
    logits = torch.zeros(*shape, 5, device=target.device, requires_grad=True)
    labels = torch.zeros(shape, dtype=torch.int64, device=target.device)
    zeros = torch.zeros(pairs, device=target.device)
    refs = () if loss_type == "sft" else (zeros, zeros)
    out = dpo_kernels.dpo_loss(
        logits,
        labels,
        *refs,
        loss_type=loss_type,
        reduction=reduction,
        cu_seqlens=cu_seqlens,
        backend=target.backend,
    )
    each = {"sigmoid": math.log(2), "aot": math.log(2), "ipo": 25.0, "sft": 0.0}[loss_type]
    assert out.losses.tolist() == pytest.approx([each] * pairs)
    if reduction == "none":
        assert out.loss.shape == (pairs,)
    else:
        assert out.loss.item() == pytest.approx(each * pairs)
    (grad,) = torch.autograd.grad(out.loss.sum(), logits)
    assert grad.shape == logits.shape and not grad.any()


def test_empty_batches_of_tokens(target):
    for shape in ((0, 4, 5), (2, 0, 5), (0, 5), (3, 0, 2, 5)):
        logits = torch.zeros(shape, device=target.device, requires_grad=True)
        labels = torch.zeros(shape[:-1], dtype=torch.int64, device=target.device)
        stats = dpo_kernels.token_stats(logits, labels, backend=target.backend)
        assert all(value.shape == labels.shape for value in stats)
        (grad,) = torch.autograd.grad(stats.logps.sum(), logits)
        assert grad.shape == logits.shape


@float_dtypes
def test_common_offset(target, dtype):
    """1e4 added to every logit: the tolerance is that of the problem without it."""
    problem = make_problem(target, dtype, scored=1.0, seed=15)
    problem = problem.with_logits(problem.logits.detach() + 1e4)
    check_tokens(target, problem)
    check_pairs(target, problem)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
# 40 nats: z_t - lse rounds to 0 beyond 16.6 nats of margin; 50257 and 67: with and without a row
# in segments
@pytest.mark.parametrize("vocab", (67, 50257))
def test_confident_tokens(target, dtype, vocab):
    """A margin of 40 nats: logp and the gradient of the label keep their relative accuracy."""
    logits = torch.randn(2, 3, vocab, generator=torch.Generator().manual_seed(16))
    labels = torch.tensor([[0, 5, vocab - 1], [3, 0, 64]])
    logits.scatter_(-1, labels.unsqueeze(-1), 40.0)
    logits, labels = logits.to(target.device, dtype).requires_grad_(), labels.to(target.device)
    wide = logits.detach().double()
    others = wide.scatter(-1, labels.unsqueeze(-1), -math.inf).logsumexp(-1)
    # log1p(x) is x to float64's digits here
    truth = -(others - 40.0).exp()
    ours = dpo_kernels.token_logps(logits, labels, backend=target.backend)
    # exp(-40 +- 4) errs by eps / 2 for each of the 44 units of its rounded argument
    relative = acc_eps(dtype) * (44 + 2 * math.log2(vocab))
    assert ((ours.double() - truth) / truth).abs().max() < relative
    (grad,) = torch.autograd.grad(ours.sum(), logits)
    at_label = grad.gather(-1, labels.unsqueeze(-1)).squeeze(-1).double()
    assert ((at_label + truth) / truth).abs().max() < relative + eps(dtype)


@pytest.mark.parametrize("margin", (15.0, 20.0, 40.0))
def test_every_digit_of_a_confident_token(target, margin):
    """One rival at -margin: logp = -log1p(exp(-margin)) and its derivative, to the last digits."""
    for options in ({}, {"temperature": 0.5}):
        logits = torch.full((1, 3, 67), -math.inf, device=target.device)
        logits[..., 5] = -margin * options.get("temperature", 1.0)
        labels = torch.tensor([[0, 66, 9]], device=target.device)
        logits.scatter_(-1, labels.unsqueeze(-1), 0.0).requires_grad_()
        ours = dpo_kernels.token_logps(logits, labels, backend=target.backend, **options)
        truth = -math.log1p(math.exp(-margin))
        # exp rounds to an ulp or two, log1p and expm1 likewise
        tolerance = 8 * eps(torch.float32)
        assert ours[0].tolist() == pytest.approx([truth] * 3, rel=tolerance, abs=0)
        (grad,) = torch.autograd.grad(ours.sum(), logits)
        wanted = math.exp(-margin) / (1 + math.exp(-margin)) / options.get("temperature", 1.0)
        at_label = grad.gather(-1, labels.unsqueeze(-1))[0, :, 0]
        assert at_label.tolist() == pytest.approx([wanted] * 3, rel=tolerance, abs=0)


@float_dtypes
@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
def test_policy_equal_to_reference_gives_ln_2(target, dtype, packed):
    """Exactly: float32(ln 2) for every pair, whatever the layout of the reference's logits."""
    problem = make_problem(target, dtype, pairs=2, packed=packed, seed=17)
    ln_2 = torch.tensor([math.log(2)] * 2, device=target.device)
    given = dpo_kernels.sequence_logps(
        problem.logits, problem.labels, **problem.layout, backend=target.backend
    ).detach()
    options = {**problem.layout, "reduction": "none", "backend": target.backend}
    out = dpo_kernels.dpo_loss(problem.logits, problem.labels, *given.chunk(2), **options)
    assert_same_bits(out.losses, ln_2)
    copy = laid_out(problem.logits.detach(), "sliced vocabulary")
    out = dpo_kernels.dpo_loss(problem.logits, problem.labels, reference_logits=copy, **options)
    assert_same_bits(out.losses, ln_2)
    assert not out.chosen_rewards.any() and not out.rejected_rewards.any()
    # the mean of two equal numbers rounds nothing
    out = dpo_kernels.dpo_loss(
        problem.logits, problem.labels, *given.chunk(2), **problem.layout, backend=target.backend
    )
    assert out.loss.item() == ln_2[0].item()


def test_extreme_log_ratios(target):
    """log sigmoid neither overflows nor turns 0 * inf into NaN at 1e6 nats either way."""
    problem = make_problem(target, pairs=2)
    refs = torch.tensor([1e6, -1e6], device=target.device)
    out = dpo_kernels.dpo_loss(
        problem.logits, problem.labels, refs, torch.zeros_like(refs), backend=target.backend
    )
    assert out.losses[0].item() == pytest.approx(1e5, rel=1e-3)
    assert out.losses[1].item() == 0.0
    assert gradient(problem, out.loss).isfinite().all()


def check_rows(logits, labels, rows, backend) -> None:
    """Log-probs at ``rows`` against the same rows taken out."""
    out = dpo_kernels.token_logps(logits, labels, backend=backend)
    for at in rows:
        truth = reference.token_logps(logits[at].detach().double()[None], labels[at][None])
        assert out[at].item() == pytest.approx(truth.item(), abs=1e-4)
    assert out.count_nonzero() == len(rows)


def resident_bytes() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


@pytest.mark.large
def test_more_than_two_billion_logits():
    """2 x 11000 x 100000 bfloat16, 4.4 GB: offsets beyond 2^31 elements and 2^32 bytes.

    Zeroed pages that are not touched cost nothing, so the fresh backward is also held to touching
    only its scored rows; the one in place must zero all the others.
    """
    if mem_available() < 7 << 30:
        pytest.skip("needs 7 GiB of free memory")
    logits = torch.zeros(2, 11_000, 100_000, dtype=torch.bfloat16)
    assert logits.numel() > 2**31
    # the first and last row, and those on either side of 2^31 elements
    rows = [(0, 0), (0, 10_999), (1, 0), (1, 10_473), (1, 10_474), (1, 10_475), (1, 10_999)]
    labels = torch.full((2, 11_000), -100)
    for number, at in enumerate(rows):
        logits[at] = torch.randn(100_000) * 3
        labels[at] = 99_999 - number
    logits.requires_grad_()
    check_rows(logits, labels, rows, "cpu")
    before = resident_bytes()
    refs = torch.full((1,), -70.0), torch.full((1,), -70.0)
    out = dpo_kernels.dpo_loss(logits, labels, *refs, shift=False, backend="cpu")
    (fresh,) = torch.autograd.grad(out.loss, logits)
    # 7 rows of 200 kB, each in huge pages of 2 MiB, and torch's own
    assert resident_bytes() - before < 128 << 20
    out = dpo_kernels.dpo_loss(
        logits * 1, labels, *refs, shift=False, inplace_backward=True, backend="cpu"
    )
    small = logits.detach()[[a for a, _ in rows], [b for _, b in rows]].double().requires_grad_()
    tokens = reference.token_logps(small[:, None], labels[labels != -100][:, None])[:, 0]
    loss = -torch.nn.functional.logsigmoid(0.1 * (tokens[:2].sum() - tokens[2:].sum()))
    (truth,) = torch.autograd.grad(loss, small)
    (in_place,) = torch.autograd.grad(out.loss, logits)
    for number, at in enumerate(rows):
        for grad in (fresh[at], in_place[at]):
            error = (grad.double() - truth[number]).abs()
            assert (error <= eps(torch.bfloat16) * truth[number].abs() + 1e-30).all()
    for at in ((0, 1), (0, 10_998), (1, 10_472), (1, 10_476), (1, 10_998)):
        assert not fresh[at].any() and not in_place[at].any()


@pytest.mark.parametrize("vocab", (131, 9000))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("power", (19, 21, 31))
def test_log_probs_far_from_zero(target, power, dtype, vocab):
    """Rows at both sides of 0, one of them in its middle alone, another masked by finfo.min.

    Beyond 2^20 the CPU's sums have another base.
    """
    far, step = 2.0**power, 2.0**power * eps(dtype)
    base = torch.randint(-4, 5, (6, vocab), generator=torch.Generator().manual_seed(power))
    rows = base.float() * step
    rows[:2] += far
    rows[2:4] -= far
    rows[4, vocab // 3 : vocab // 2] += far
    rows[3, ::2] = torch.finfo(dtype).min
    rows, labels = rows.to(dtype), torch.arange(6) * 20 + 1
    assert rows.isfinite().all()
    truth = torch.log_softmax(rows.double(), -1)[torch.arange(6), labels]
    arguments = rows.to(target.device), labels.to(target.device)
    ours = dpo_kernels.token_logps(*arguments, backend=target.backend)
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=2e-6, atol=2e-6)
