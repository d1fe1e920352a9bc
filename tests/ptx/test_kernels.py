"""All 22 CUDA kernels run: every dtype and gradient, with statistics or not, with a softcap or not.

The softcap is reached from hidden states only, so the backend is called as the ops call it; the
torch backend fills the same outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from dpo_kernels.backends import cuda
from dpo_kernels.backends import torch as plain
from dpo_kernels.backends.batch import ForwardOutputs, GradOutput, PairLoss, TokenBatch

from . import targets

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (logits, gradient)
PAIRS = [(d, d) for d in DTYPES] + [(torch.float32, d) for d in DTYPES[1:]]
# share of a kernel's instructions that run here at least once; counted 92 to 96%
LEAST_COVERAGE = 0.9


@dataclass
class Call:
    batch: TokenBatch
    # what the gradient is indexed by; "token" is without sequences, "sequence" without a loss
    index: str = "pair"
    average: bool = False
    # and smoothed
    referenced: bool = True
    zero_unscored: bool = True
    backward: bool = True

    def outputs(self, stats: bool) -> ForwardOutputs:
        n, s, pair = self.batch.num_tokens, self.batch.num_seqs, self.index == "pair"
        sequences = self.index != "token"
        return ForwardOutputs(
            tokens=torch.empty(3, n),
            stats=torch.empty(3, n) if stats else None,
            is_top1=torch.empty(n, dtype=torch.bool) if stats else None,
            seqs=torch.empty(3 if pair else 2, s) if sequences else None,
            counts=torch.empty(s, dtype=torch.int64) if sequences else None,
            losses=torch.empty(s // 2) if pair else None,
            loss=torch.empty(()) if pair else None,
            average=self.average,
        )

    def pair_loss(self) -> PairLoss | None:
        if self.index != "pair":
            return None
        if not self.referenced:
            return PairLoss(None, 0.1, 0.0, 0.5)
        return PairLoss(-20 - torch.rand(self.batch.num_seqs), 0.1, 0.1, 0.5)

    def grad_output(self, out: ForwardOutputs) -> GradOutput:
        if self.index == "pair":
            return GradOutput(torch.ones(1), 0, "pair", out.seqs[1])
        count = self.batch.num_tokens if self.index == "token" else self.batch.num_seqs
        scale = None if self.index == "token" else out.seqs[1]
        return GradOutput(torch.linspace(-1, 1, count), 1, self.index, scale)


def problem(
    dtype, vocab: int, softcap: float, *, shape=(4, 5), scored=0.7, packed=(), **options
) -> TokenBatch:
    """``packed``: where the sequences begin and the last one ends."""
    torch.manual_seed(vocab)
    logits = (3 * torch.randn(*shape, vocab)).to(dtype)
    labels = torch.randint(options.get("vocab_total", vocab), shape)
    labels[torch.rand(shape) > scored] = -100
    if not packed:
        return TokenBatch(logits, labels, None, -100, True, softcap=softcap, **options)
    flat = logits.flatten(0, 1), labels.flatten(), torch.tensor(packed)
    return TokenBatch(*flat, -100, True, softcap=softcap, **options)


def sliced(batch: TokenBatch) -> TokenBatch:
    """Rows that are aligned otherwise than those of a new gradient."""
    *shape, vocab = batch.logits.shape
    memory = torch.full((*shape, vocab + 3), torch.nan, dtype=batch.logits.dtype)
    return replace(batch, logits=memory[..., :vocab].copy_(batch.logits))


def calls(dtype, softcap: float) -> Iterator[Call]:
    """Short and odd rows, rows of several spans, aligned and not, packed, and extreme logits; every
    index of a gradient, padded and packed; a shard; and tokens outside of all sequences."""
    starts = (0, 3, 9, 14, 20)
    yield Call(problem(dtype, 7, softcap))
    yield Call(problem(dtype, 2059, softcap))
    yield Call(problem(dtype, 6144, softcap))
    yield Call(problem(dtype, 4099, softcap, packed=starts))
    yield Call(problem(dtype, 1004, softcap, scale=-1.0))
    yield Call(sliced(problem(dtype, 2200, softcap, shape=(2, 3))))
    for packed in ((), starts):
        yield Call(problem(dtype, 8, softcap, packed=packed), "token")
        yield Call(problem(dtype, 8, softcap, packed=packed), "sequence", average=True)
    yield Call(problem(dtype, 7, softcap, vocab_start=1, vocab_total=9), "token")
    inside = problem(dtype, 7, softcap, packed=(0, 3, 3, 14, 19))
    yield Call(inside, average=True, referenced=False, zero_unscored=False)
    if softcap == 0:
        # exponents far beyond what a float32 resolves to 1, and logits that are -inf
        extreme = problem(dtype, 2059, softcap)
        extreme.logits[:2] *= torch.finfo(dtype).max / 64
        extreme.logits[2:, :, ::3] = -torch.inf
        yield Call(replace(extreme, labels=torch.where(extreme.labels < 0, -100, 1)))


def long_calls(dtype, softcap: float) -> Iterator[Call]:
    """As many rows as give a lane several labels to count, and warps several spans at once; more
    sequences than warps. Nothing in backward depends on either."""
    for packed in ((), (0, 1850, 3800)):
        batch = problem(dtype, 3, softcap, shape=(2, 1900), scored=0.12, packed=packed)
        yield Call(batch, backward=False)
    yield Call(problem(dtype, 3, softcap, shape=(140, 2)), backward=False)


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_cuda_kernel(dtypes, stats, softcap):
    dtype, grad_dtype = dtypes
    for call in calls(dtype, softcap):
        check(call, stats, grad_dtype)
    if dtype == grad_dtype:
        for call in long_calls(dtype, softcap):
            check(call, stats, grad_dtype)


def check(call: Call, stats: bool, grad_dtype: torch.dtype) -> None:
    batch, pair = call.batch, call.pair_loss()
    ours, theirs = call.outputs(stats), call.outputs(stats)
    # zeros, for the rows that are left alone
    grads = [torch.zeros(batch.logits.shape, dtype=grad_dtype) for _ in range(2)]
    with targets.running("cuda"):
        cuda.forward(batch, pair, ours)
        given, tokens = call.grad_output(ours), ours.tokens.clone()
        if batch.vocab_total:
            # as if the other shards had no chance
            tokens[0] -= tokens[1] + tokens[2]
        if call.backward:
            cuda.backward(batch, tokens, given, grads[0], call.zero_unscored)
    plain.forward(batch, pair, theirs)
    if call.backward:
        plain.backward(batch, tokens, given, grads[1], call.zero_unscored)
    for name in ("tokens", "stats", "seqs", "losses", "loss"):
        if getattr(ours, name) is not None:
            got, want = getattr(ours, name), getattr(theirs, name)
            torch.testing.assert_close(
                got, want, rtol=2e-5, atol=2e-5, equal_nan=True, msg=f"{name}: {got} {want}"
            )
    assert ours.counts is None or torch.equal(ours.counts, theirs.counts)
    eps = torch.finfo(grad_dtype).eps
    torch.testing.assert_close(grads[0], grads[1], rtol=2 * eps + 1e-4, atol=1e-6, equal_nan=True)


def test_cuda_coverage():
    """After the tests above, which run in this process."""
    covered = targets.executor("cuda").coverage()
    if len(covered) < 22:
        pytest.skip(f"only {len(covered)} of 22 kernels were run")
    low = {
        name: f"{done / every:.0%}"
        for name, (done, every) in covered.items()
        if done < LEAST_COVERAGE * every
    }
    assert low == {}
