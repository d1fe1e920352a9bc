"""All 18 CUDA kernels run: every dtype, with statistics or not, with a softcap or not.

The softcap is reached from hidden states only, so the backend is called as the ops call it; the
torch backend fills the same outputs.
"""

from __future__ import annotations

import pytest
import torch

from dpo_kernels.backends import batch as structs
from dpo_kernels.backends import cuda
from dpo_kernels.backends import torch as plain

from . import targets


def problem(dtype, vocab: int, softcap: float):
    torch.manual_seed(vocab)
    logits = (3 * torch.randn(4, 5, vocab)).to(dtype)
    labels = torch.randint(vocab, (4, 5))
    labels[torch.rand(4, 5) < 0.3] = -100
    return structs.TokenBatch(logits, labels, None, -100, True, softcap=softcap)


def outputs(stats: bool):
    return structs.ForwardOutputs(
        tokens=torch.empty(3, 20),
        stats=torch.empty(3, 20) if stats else None,
        is_top1=torch.empty(20, dtype=torch.bool) if stats else None,
        seqs=torch.empty(3, 4),
        counts=torch.empty(4, dtype=torch.int64),
        losses=torch.empty(2),
        loss=torch.empty(()),
        average=False,
    )


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cuda_kernel(dtype, stats, softcap):
    for vocab in (7, 2059):
        batch = problem(dtype, vocab, softcap)
        pair = structs.PairLoss(-20 - torch.rand(4), 0.1, 0.1, 0.5)
        ours, theirs = outputs(stats), outputs(stats)
        grad_output = torch.ones(1)
        grads = [torch.empty_like(batch.logits) for _ in range(2)]
        with targets.running("cuda"):
            cuda.forward(batch, pair, ours)
            given = structs.GradOutput(grad_output, 0, "pair", ours.seqs[1])
            cuda.backward(batch, ours.tokens, given, grads[0], True)
        plain.forward(batch, pair, theirs)
        plain.backward(batch, ours.tokens, given, grads[1], True)
        for name in ("tokens", "stats", "seqs", "losses", "loss"):
            if getattr(ours, name) is not None:
                got, want = getattr(ours, name), getattr(theirs, name)
                torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, msg=name)
        assert torch.equal(ours.counts, theirs.counts)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(grads[0], grads[1], rtol=2 * eps + 1e-4, atol=1e-6)
