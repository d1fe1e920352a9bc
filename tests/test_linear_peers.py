"""From hidden states: the same losses and gradients as liger-kernel and TRL, where installed.

Both are compared in float32, where they and ours are right to a few hundred roundings.
"""

from __future__ import annotations

import pytest
import torch

import dpo_kernels as dk
from tests.linear_helpers import make_head

pytestmark = pytest.mark.integrations

LIGER_LOSSES = {
    "sigmoid": {},
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("loss_type", LIGER_LOSSES)
def test_liger(loss_type, bias):
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    problem = make_head(bias=bias, vocab=131)
    options = {"loss_type": loss_type, "beta": 0.2, **LIGER_LOSSES[loss_type]}
    theirs = chunked_loss.LigerFusedLinearDPOLoss(compiled=False, **options)
    ref_weight = problem.weight.detach() * 0.9
    loss, (chosen, rejected, _, _, _, chosen_rewards, rejected_rewards) = theirs(
        problem.weight,
        problem.hidden[:, :-1],
        problem.labels[:, 1:],
        problem.bias,
        problem.reference_hidden[:, :-1],
        ref_weight,
        None if problem.bias is None else problem.bias.detach(),
    )
    ours = dk.linear_dpo_loss(
        problem.hidden,
        problem.weight,
        problem.labels,
        bias=problem.bias,
        reference_hidden=problem.reference_hidden,
        reference_weight=ref_weight,
        reference_bias=None if problem.bias is None else problem.bias.detach(),
        **options,
    )
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ours.loss, loss, **close)
    torch.testing.assert_close(ours.chosen_logps, chosen, **close)
    torch.testing.assert_close(ours.rejected_logps, rejected, **close)
    torch.testing.assert_close(ours.chosen_rewards, chosen_rewards, **close)
    torch.testing.assert_close(ours.rejected_rewards, rejected_rewards, **close)
    got = torch.autograd.grad(ours.loss, problem.trainable)
    for a, b in zip(got, torch.autograd.grad(loss, problem.trainable), strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_trl(frozen, softcap):
    kernels = pytest.importorskip("trl.kernels")
    problem = make_head(frozen=frozen, vocab=131)
    labels = problem.labels[:, 1:]
    scored = labels != -100
    theirs, entropy, sum_sq, mean_logits, is_top1 = kernels.ChunkedLogProbFunction.apply(
        problem.hidden[:, :-1][scored],
        problem.weight,
        problem.bias,
        labels[scored],
        0.8,
        64,
        softcap,
        0.7,
    )
    ours = dk.linear_token_stats(
        problem.hidden,
        problem.weight,
        problem.labels,
        bias=problem.bias,
        shift=True,
        temperature=0.8,
        logit_softcap=softcap,
        logit_scale=0.7,
    )
    close = {"rtol": 1e-4, "atol": 1e-5}
    for got, want in (
        (ours.logps, theirs),
        (ours.entropy, entropy),
        (ours.log_sum_sq_probs, sum_sq),
        (ours.mean_logits, mean_logits),
        (ours.is_top1, is_top1),
    ):
        torch.testing.assert_close(got[:, 1:][scored], want, **close)
    derivatives = torch.linspace(-1, 2, int(scored.sum()))
    got = torch.autograd.grad(ours.logps[:, 1:][scored], problem.trainable, derivatives)
    want = torch.autograd.grad(theirs, problem.trainable, derivatives)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **close)
