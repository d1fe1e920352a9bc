"""Calls of a backend as the ops make them, executed and compared with the torch backend.

The softcap and a shard are reached from hidden states and over ranks only; the torch backend fills
the same outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dpo_kernels.backends import torch as plain
from dpo_kernels.backends.batch import ForwardOutputs, GradOutput, PairLoss, TokenBatch
from dpo_kernels.dispatch import backend_module

from . import targets


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


def check(backend: str, call: Call, stats: bool, grad_dtype: torch.dtype) -> None:
    module = backend_module(backend)
    batch, pair = call.batch, call.pair_loss()
    ours, theirs = call.outputs(stats), call.outputs(stats)
    # zeros, for the rows that are left alone
    grads = [torch.zeros(batch.logits.shape, dtype=grad_dtype) for _ in range(2)]
    with targets.running(backend):
        module.forward(batch, pair, ours)
        given, tokens = call.grad_output(ours), ours.tokens.clone()
        if batch.vocab_total:
            # as if the other shards had no chance
            tokens[0] -= tokens[1] + tokens[2]
        if call.backward:
            module.backward(batch, tokens, given, grads[0], call.zero_unscored)
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
