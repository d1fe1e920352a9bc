"""Labels and boundaries outside their range: an error on a CPU, NaN in its own row on a GPU."""

from __future__ import annotations

import math

import pytest
import torch

import dpo_kernels
from dpo_kernels import dispatch, dpo_loss, ops
from dpo_kernels.backends.batch import GradOutput, TokenBatch
from tests.bad_calls import BASE, LABELS, LOGITS, PACKED, REF


@pytest.mark.parametrize("bad", (5, -1, 2**40, -(2**63)))
@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
def test_label_out_of_range(target, bad, packed):
    """On a CPU it raises with its position; on a GPU its row is NaN, never read out of bounds."""
    arguments = {k: v.to(target.device) for k, v in (PACKED if packed else BASE).items()}
    refs = (REF.to(target.device),) * 2
    labels = arguments["labels"] = arguments["labels"].clone()
    labels.view(-1)[7] = bad
    logits = arguments.pop("policy_logits").clone().requires_grad_()
    position = r"\[(0, )?7\]" if packed else r"\[2, 1\]"
    options = {"cu_seqlens": arguments.get("cu_seqlens"), "backend": target.backend}

    def sequences():
        return dpo_kernels.sequence_logps(logits, labels, **options)

    def tokens():
        return dpo_kernels.token_logps(logits, labels, backend=target.backend)

    def pairs():
        return dpo_loss(logits, labels, *refs, **options).losses

    if target.device == "cpu":
        for call in (sequences, tokens, pairs):
            with pytest.raises(
                ValueError, match=rf"^labels{position}: .*0 <= label < 5, got {bad}$"
            ):
                call()
        return
    out = tokens()
    assert out.view(-1).isnan().nonzero().tolist() == [[7]]
    grad = torch.autograd.grad(out.sum(), logits)[0].view(12, 5)
    assert grad.isnan().any(-1).nonzero().tolist() == [[7]] and grad[7].isnan().all()
    assert sequences().isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("bad", (5, -1, 2**40, -(2**63)))
@pytest.mark.parametrize("shift", (False, True))
def test_torch_backend_never_indexes_with_a_bad_label(bad, shift):
    """Called as on a GPU, where nobody has looked at the labels: a row of NaN, the others as ever.

    There an index out of bounds ends the CUDA context, and every later call of the process.
    """
    module = dispatch.backend_module("torch")
    logits = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    outputs = []
    for label in (1, bad):
        labels = LABELS.clone()
        labels[2, 1] = label
        batch = TokenBatch(logits, labels, None, -100, shift)
        out = ops.make_outputs(batch, stats=True)
        module.forward(batch, None, out)
        grad_logits = torch.empty_like(logits)
        grad_output = GradOutput(torch.ones(12), 1, "token", None)
        module.backward(batch, out.tokens, grad_output, grad_logits, True)
        outputs.append((out.tokens[0].view(4, 3), grad_logits))
    for values in (*out.tokens, *out.stats):
        assert values.isnan().nonzero().tolist() == [[7]]
    (clean, clean_grad), (logps, grad) = outputs
    row = 1 - shift
    assert logps.isnan().nonzero().tolist() == [[2, 1]]
    assert grad.isnan().all(-1).nonzero().tolist() == [[2, row]]
    logps[2, 1], grad[2, row] = clean[2, 1], clean_grad[2, row]
    assert torch.equal(logps, clean) and torch.equal(grad, clean_grad)


def test_label_out_of_range_where_nothing_is_scored(target):
    """With shift the first label of a sequence scores nothing, whatever it holds."""
    labels = LABELS.clone().to(target.device)
    labels[:, 0] = 10**12
    out = dpo_kernels.sequence_logps(LOGITS.to(target.device), labels, backend=target.backend)
    assert out.tolist() == pytest.approx([-2 * math.log(5)] * 4)


@pytest.mark.gpu
def test_validation_on_a_gpu(monkeypatch):
    monkeypatch.setenv("DPO_KERNELS_VALIDATE", "1")
    labels = LABELS.clone().cuda()
    labels[2, 1] = 5
    with pytest.raises(ValueError, match=r"^labels\[2, 1\]: .*got 5"):
        dpo_kernels.token_logps(LOGITS.cuda(), labels)


def test_bad_cu_seqlens_on_every_backend(target):
    if target.device != "cpu":
        pytest.skip("on a GPU the values of cu_seqlens are not waited for")
    for bounds in ([0, 3, 6, 9, 13], [1, 3, 6, 9, 12], [0, 6, 3, 9, 12], [0, 3, 6, 9, 11]):
        with pytest.raises(ValueError, match=r"^cu_seqlens: expected to rise from 0"):
            dpo_kernels.sequence_logps(
                PACKED["policy_logits"],
                PACKED["labels"],
                cu_seqlens=torch.tensor(bounds),
                backend=target.backend,
            )
