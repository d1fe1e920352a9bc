"""Sums that leave the dtype where the mean they are for does not."""

from __future__ import annotations

import pytest
import torch

import dpo_kernels
from tests.entries import packings
from tests.helpers import acc_eps, skip_if_refused


def extreme_rows(dtype: torch.dtype, vocab: int) -> torch.Tensor:
    """Everywhere near the largest number, on one side or on both, masked by finfo.min, and not."""
    largest = torch.finfo(dtype).max
    rows = torch.randn(6, vocab, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[0] = largest
    rows[1] = -largest
    rows[2, ::2] = -largest
    rows[3, : vocab // 2], rows[3, vocab // 2 :] = largest, -largest
    rows[4] *= largest / 64
    return rows


# one segment of a row and several; 5000 columns are two of CUDA's spans, 9000 two of the CPU's
@pytest.mark.parametrize("vocab", (131, 5000, 9000))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_mean_logits(target, dtype, vocab):
    skip_if_refused(target, dtype)
    rows, labels = extreme_rows(dtype, vocab), torch.arange(6) * 20
    # scaled by a power of two, so that float64 holds the sums of float64
    wide = rows.double() * 2.0**-64
    truth, size = wide.mean(-1), wide.abs().mean(-1)
    arguments = rows.to(target.device), labels.to(target.device)
    stats = dpo_kernels.token_stats(*arguments, backend=target.backend)
    ours = stats.mean_logits.cpu()
    assert ours.isfinite().all()
    off = (ours.double() * 2.0**-64 - truth).abs()
    # sums over the vocabulary in blocks, as in stats_tolerances
    assert (off <= acc_eps(dtype) * 40 * size).all(), off / size


@pytest.mark.parametrize("vocab", (131, 5000))
def test_log_probs_and_gradients(target, vocab):
    """A product with log2(e) overflows, a difference of two logits as well: -inf, never NaN."""
    rows, labels = extreme_rows(torch.float32, vocab), torch.arange(6) * 20
    wide = rows.double().requires_grad_()
    truth = dpo_kernels.token_stats(wide, labels, backend="torch")
    truth.logps.sum().backward()
    leaf = rows.to(target.device).requires_grad_()
    ours = dpo_kernels.token_stats(leaf, labels.to(target.device), backend=target.backend)
    ours.logps.sum().backward()
    for name in ("logps", "entropy", "log_sum_sq_probs"):
        # what float32 does not hold is infinite
        kept = getattr(truth, name).detach().float()
        got = getattr(ours, name).detach().cpu()
        torch.testing.assert_close(got, kept, rtol=2e-6, atol=2e-6, msg=name)
    assert torch.equal(ours.is_top1.cpu(), truth.is_top1)
    torch.testing.assert_close(leaf.grad.cpu().double(), wide.grad, rtol=1e-5, atol=1e-6)


def test_mean_of_logits_that_a_temperature_takes_too_far(target):
    """Infinite, as they are, where it is not the rounding of a sum that goes too far."""
    logits = torch.full((2, 40), -torch.finfo(torch.float32).max, device=target.device)
    logits[1] /= 2
    labels = torch.zeros(2, dtype=torch.int64, device=target.device)
    stats = dpo_kernels.token_stats(logits, labels, temperature=0.25, backend=target.backend)
    assert stats.mean_logits.tolist() == [-torch.inf] * 2


def test_mean_of_logits_of_which_a_temperature_takes_one_too_far(target):
    """Not the mean, which float32 holds."""
    logits = torch.zeros(1, 127, device=target.device)
    logits[0, 3] = -torch.finfo(torch.float32).max
    labels = torch.zeros(1, dtype=torch.int64, device=target.device)
    stats = dpo_kernels.token_stats(logits, labels, temperature=0.25, backend=target.backend)
    expected = float(logits[0, 3]) * 4 / 127
    assert stats.mean_logits.item() == pytest.approx(expected, rel=1e-6)


@packings
@pytest.mark.parametrize("source", ("logits", "hidden"))
def test_average_log_prob(target, source, packed):
    """Labels that a mask of finfo.min has hit: three such log-probs have a mean, and no sum."""
    largest = torch.finfo(torch.float32).max
    labels = torch.full((6,) if packed else (2, 3), 7, device=target.device)
    bias = torch.zeros(50, device=target.device)
    bias[7] = -largest
    bounds = torch.tensor([0, 3, 6], device=target.device) if packed else None
    options = {"average_log_prob": True, "shift": False, "cu_seqlens": bounds}
    options["backend"] = target.backend
    if source == "logits":
        arguments, prefix = (bias.expand(*labels.shape, 50), labels), ""
    else:
        hidden = torch.zeros(*labels.shape, 4, device=target.device)
        arguments, prefix = (hidden, torch.zeros(50, 4, device=target.device), labels), "linear_"
        options["bias"] = bias
    logps = getattr(dpo_kernels, f"{prefix}sequence_logps")(*arguments, **options)
    assert logps.tolist() == [-largest] * 2
    # made by the kernel, and on top of it
    for loss_type in ("sigmoid", "hinge"):
        output = getattr(dpo_kernels, f"{prefix}dpo_loss")(
            *arguments, reference_free=True, loss_type=loss_type, **options
        )
        assert output.chosen_logps.tolist() == output.rejected_logps.tolist() == [-largest]
        assert output.loss.isfinite()
