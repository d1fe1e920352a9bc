"""All 22 CUDA kernels run: every dtype and gradient, with statistics or not, with a softcap or not.

The softcap is reached from hidden states only, so the backend is called as the ops call it; the
torch backend fills the same outputs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpo_kernels.backends import cuda
from dpo_kernels.backends import torch as plain
from dpo_kernels.backends.batch import ForwardOutputs, GradOutput, PairLoss, TokenBatch

from . import targets

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (logits, gradient)
PAIRS = [(d, d) for d in DTYPES] + [(torch.float32, d) for d in DTYPES[1:]]
# Share of a kernel's instructions that run here at least once; counted 73 to 82% and 81 to 89%.
# Part of what does not is inlined once for padded and once for packed batches, or for other losses
# and indices of the gradient than the pair's.
LEAST_COVERAGE = {"forward": 0.72, "backward": 0.80}


def problem(dtype, vocab: int, softcap: float, *, packed=False, **options):
    torch.manual_seed(vocab)
    logits = (3 * torch.randn(4, 5, vocab)).to(dtype)
    labels = torch.randint(vocab, (4, 5))
    labels[torch.rand(4, 5) < 0.3] = -100
    if not packed:
        return TokenBatch(logits, labels, None, -100, True, softcap=softcap, **options)
    starts = torch.tensor([0, 3, 9, 14, 20])
    flat = logits.flatten(0, 1), labels.flatten()
    return TokenBatch(*flat, starts, -100, True, softcap=softcap, **options)


def outputs(stats: bool):
    return ForwardOutputs(
        tokens=torch.empty(3, 20),
        stats=torch.empty(3, 20) if stats else None,
        is_top1=torch.empty(20, dtype=torch.bool) if stats else None,
        seqs=torch.empty(3, 4),
        counts=torch.empty(4, dtype=torch.int64),
        losses=torch.empty(2),
        loss=torch.empty(()),
        average=False,
    )


def batches(dtype, softcap: float):
    """Short and odd rows, rows of several spans, aligned and not, packed, and extreme logits."""
    yield problem(dtype, 7, softcap)
    yield problem(dtype, 2059, softcap)
    yield problem(dtype, 6144, softcap)
    yield problem(dtype, 4099, softcap, packed=True)
    yield problem(dtype, 1004, softcap, scale=-1.0)
    if softcap == 0:
        # exponents far beyond what a float32 resolves to 1, and logits that are -inf
        extreme = problem(dtype, 2059, softcap)
        extreme.logits[:2] *= torch.finfo(dtype).max / 64
        extreme.logits[2:, :, ::3] = -torch.inf
        yield replace(extreme, labels=torch.where(extreme.labels < 0, -100, 1))


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_cuda_kernel(dtypes, stats, softcap):
    dtype, grad_dtype = dtypes
    for batch in batches(dtype, softcap):
        pair = PairLoss(-20 - torch.rand(4), 0.1, 0.1, 0.5)
        ours, theirs = outputs(stats), outputs(stats)
        grads = [torch.empty_like(batch.logits, dtype=grad_dtype) for _ in range(2)]
        with targets.running("cuda"):
            cuda.forward(batch, pair, ours)
            given = GradOutput(torch.ones(1), 0, "pair", ours.seqs[1])
            cuda.backward(batch, ours.tokens, given, grads[0], True)
        plain.forward(batch, pair, theirs)
        plain.backward(batch, ours.tokens, given, grads[1], True)
        for name in ("tokens", "stats", "seqs", "losses", "loss"):
            if getattr(ours, name) is not None:
                got, want = getattr(ours, name), getattr(theirs, name)
                torch.testing.assert_close(
                    got, want, rtol=2e-5, atol=2e-5, equal_nan=True, msg=f"{name}: {got} {want}"
                )
        assert torch.equal(ours.counts, theirs.counts)
        eps = torch.finfo(grad_dtype).eps
        torch.testing.assert_close(
            grads[0], grads[1], rtol=2 * eps + 1e-4, atol=1e-6, equal_nan=True
        )


def test_cuda_coverage():
    """After the tests above, which run in this process."""
    covered = targets.executor("cuda").coverage()
    if len(covered) < 22:
        pytest.skip(f"only {len(covered)} of 22 kernels were run")
    low = {
        name: f"{done / every:.0%}"
        for name, (done, every) in covered.items()
        for kind, least in LEAST_COVERAGE.items()
        if f"{kind}_kernel" in name and done < least * every
    }
    assert low == {}
