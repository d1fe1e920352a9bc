"""Logits so large that a product with log2(e) has no useful rounding, or overflows."""

from __future__ import annotations

import pytest
import torch

import dpo_kernels

LARGEST = torch.finfo(torch.float32).max
VOCAB = 5000


def rows_of(name: str) -> torch.Tensor:
    rows = torch.full((3, VOCAB), -LARGEST)
    if name == "both extremes":
        # two maxima, the label one of them; no maximum; a label far below it
        rows[0, 0] = rows[0, 7] = LARGEST
        rows[2, 9] = LARGEST
    elif name == "masked by finfo.min":
        rows[:, :10] = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    elif name == "masked by -1e10":
        rows[:] = -1e10
        rows[:, 4000], rows[:, 1] = 3.0, 2.0
    elif name == "far out":
        rows = 1e10 + 1024 * torch.arange(float(VOCAB)).expand(3, VOCAB)
    elif name == "masked by -inf":
        rows[:] = -torch.inf
        rows[:, 1] = 0.3
    else:
        assert name == "all finfo.min"
    return rows.contiguous()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "both extremes",
        "all finfo.min",
        "masked by finfo.min",
        "masked by -1e10",
        "masked by -inf",
        "far out",
    ],
)
def test_large_logits_are_as_right_as_any(name, split, monkeypatch):
    reason = dpo_kernels.available_backends()["triton"]
    if reason is not None or torch.cuda.is_available():
        pytest.skip(reason or "runs in Triton's interpreter")
    from dpo_kernels.backends.triton import launch

    monkeypatch.setattr(launch, "_splits", lambda batch, segments: split)
    logits, labels = rows_of(name), torch.tensor([0, 1, 2])
    if split:
        # a second segment
        logits = torch.cat([logits, torch.full((3, 32768), -LARGEST)], 1)
    truth = dpo_kernels.token_stats(logits.double(), labels, backend="torch")
    leaf = logits.clone().requires_grad_()
    ours = dpo_kernels.token_stats(leaf, labels, backend="triton")
    for field in ("logps", "entropy", "mean_logits", "log_sum_sq_probs"):
        # float32 has no number below -LARGEST but -inf
        expected = getattr(truth, field).float().double()
        torch.testing.assert_close(
            getattr(ours, field).detach().double(), expected, rtol=2e-6, atol=2e-6, msg=field
        )
    assert torch.equal(ours.is_top1, truth.is_top1)
    wide = logits.double().requires_grad_()
    dpo_kernels.token_logps(wide, labels, backend="torch").sum().backward()
    dpo_kernels.token_logps(leaf, labels, backend="triton").sum().backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)
