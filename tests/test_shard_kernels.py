"""What a backend gives for shards of the vocabulary, merged, is what the whole vocabulary gives.

The backends are called as the ops call them, on every shard in turn. The merge is float64, so that
what is off is the kernels' doing.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dpo_kernels import TokenStats, reference
from dpo_kernels.backends.batch import ForwardOutputs, GradOutput, TokenBatch
from dpo_kernels.dispatch import backend_module
from dpo_kernels.parallel.vocabulary import UNKNOWN_TOTAL
from tests.helpers import (
    IGNORE,
    acc_eps,
    assert_rule,
    assert_same_bits,
    gradient_tolerance,
    logp_tolerance,
    stats_tolerances,
)

# less than a vector, a whole number of vectors, a single column, odd starts
SIZES = (3, 500, 1, 499)
# several of Triton's segments, several spans of the CUDA kernels
LONG_SIZES = (33_001, 5000)
MIXED = [
    (torch.float32, {}),
    (torch.float32, {"scale": -0.5}),
    (torch.bfloat16, {"softcap": 5.0}),
    (torch.bfloat16, {"temperature": 0.7}),
]
BOTH = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)


@dataclass
class Rows:
    logits: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    shift: bool
    sizes: tuple[int, ...]
    transform: dict

    @property
    def vocab(self) -> int:
        return self.logits.shape[-1]

    @property
    def whole(self) -> TokenBatch:
        layout = (self.cu_seqlens, IGNORE, self.shift)
        return TokenBatch(self.logits, self.labels, *layout, **self.transform)

    @property
    def shards(self) -> list[TokenBatch]:
        starts = itertools.accumulate(self.sizes, initial=0)
        return [
            replace(self.whole, logits=part, vocab_start=start, vocab_total=self.vocab)
            for part, start in zip(self.logits.split(self.sizes, -1), starts, strict=False)
        ]

    @property
    def scored(self) -> Tensor:
        """[N], of the tokens."""
        layout = {"shift": self.shift, "cu_seqlens": self.cu_seqlens}
        return (reference.scored_labels(self.labels, **layout) != IGNORE).flatten()

    @property
    def z_max(self) -> float:
        """Of the z that are not logits as they came, and so are rounded; twice for a tanh."""
        if not self.transform:
            return 0.0
        z = reference.transform_logits(self.logits.double(), **self.transform)
        return z[z.isfinite()].abs().max().item() * (1 + ("softcap" in self.transform))

    def reference(self, leaf: Tensor) -> TokenStats:
        layout = {"shift": self.shift, "cu_seqlens": self.cu_seqlens}
        return reference.token_stats(leaf, self.labels, **layout, **self.transform)


def make_rows(
    target, dtype, sizes=SIZES, *, seqs=2, length=6, packed=False, shift=True, **transform
) -> Rows:
    """Labels at both ends of every shard, the others anywhere; the last tokens are not scored."""
    vocab, rng = sum(sizes), torch.Generator().manual_seed(len(sizes))
    logits = (3 * torch.randn(seqs, length, vocab, generator=rng)).to(dtype)
    labels = torch.randint(vocab, (seqs, length), generator=rng)
    ends = list(itertools.accumulate(sizes))
    borders = [b for end, size in zip(ends, sizes, strict=True) for b in (end - size, end - 1)]
    scored = ((s, t) for s in range(seqs) for t in range(int(shift), length))
    for place, label in zip(scored, borders, strict=False):
        labels[place] = label
    labels[-1, -2:] = IGNORE
    cu_seqlens = None
    if packed:
        cu_seqlens = (torch.arange(seqs + 1) * length).to(target.device)
        logits, labels = logits.flatten(0, 1), labels.flatten()
    logits, labels = logits.to(target.device), labels.to(target.device)
    return Rows(logits, labels, cu_seqlens, shift, sizes, transform)


def forward(target, batch: TokenBatch, stats=True) -> ForwardOutputs:
    n, device = batch.num_tokens, batch.logits.device
    out = ForwardOutputs(
        tokens=torch.full((3, n), math.nan, device=device),
        stats=torch.full((3, n), math.nan, device=device) if stats else None,
        is_top1=torch.ones(n, dtype=torch.bool, device=device) if stats else None,
        seqs=None,
        counts=None,
        losses=None,
        loss=None,
        average=False,
    )
    assert backend_module(target.backend).forward(batch, None, out) == -1
    return out


def merge(rows: Rows, outs: list[ForwardOutputs]) -> tuple[Tensor, TokenStats]:
    """([3, N] for the backward, statistics) of the whole vocabulary, in float64.

    With w_r the share of shard r in the softmax: the entropy is that of w plus the mean of the
    shards', and sum p^2 = sum_r w_r^2 (sum p^2)_r.
    """
    z, row_max, log_sum = torch.stack([out.tokens for out in outs]).double().unbind(1)
    entropy, mean, log_squares = torch.stack([out.stats for out in outs]).double().unbind(1)
    top = row_max.amax(0)
    parts = row_max - top + log_sum
    total = parts.logsumexp(0)
    tokens = torch.stack((z.sum(0) - top - total, top, total))
    log_w = parts - total
    w = log_w.exp()
    sizes = torch.tensor(rows.sizes, device=w.device, dtype=w.dtype)[:, None]
    # the first of equal maxima is in the first shard that has it
    owner = row_max.argmax(0, keepdim=True)
    top1 = torch.stack([out.is_top1 for out in outs]).gather(0, owner)[0]
    shape = rows.labels.shape
    stats = (
        tokens[0],
        torch.special.entr(w).sum(0) + (w * entropy).sum(0),
        (sizes * mean).sum(0) / rows.vocab,
        top1,
        (2 * log_w + log_squares).logsumexp(0),
    )
    scored = rows.scored
    tokens = tokens.where(scored, 0.0)
    return tokens, TokenStats(*(x.where(scored, x.new_zeros(())).view(shape) for x in stats))


def backward(target, rows: Rows, tokens: Tensor, coefficients: Tensor) -> Tensor:
    """The gradients of the shards, side by side."""
    grad = torch.full_like(rows.logits, math.nan)
    given = GradOutput(coefficients.float(), 1, "token", None)
    for batch, part in zip(rows.shards, grad.split(rows.sizes, -1), strict=True):
        module = backend_module(target.backend)
        assert module.backward(batch, tokens.float(), given, part, True) == -1
    return grad


def elsewhere(rows: Rows, batch: TokenBatch) -> Tensor:
    """[N]: whether the label is on another shard."""
    column = rows.labels.flatten() - batch.vocab_start
    return (column < 0) | (column >= batch.logits.shape[-1])


def check(target, rows: Rows) -> None:
    """Statistics and gradients of the merged shards against float64."""
    dtype, scored = rows.logits.dtype, rows.scored
    outs = [forward(target, batch) for batch in rows.shards]
    for batch, out in zip(rows.shards, outs, strict=True):
        assert not out.tokens[:, ~scored].any() and not out.stats[:, ~scored].any()
        foreign = elsewhere(rows, batch)
        assert not out.tokens[0, foreign].any() and not out.is_top1[foreign].any()
    assert_same_bits(forward(target, rows.shards[1], stats=False).tokens, outs[1].tokens)
    tokens, ours = merge(rows, outs)

    leaves = [rows.logits.detach().to(d).requires_grad_() for d in (dtype, torch.float64)]
    theirs, truth = (rows.reference(leaf) for leaf in leaves)
    z = reference.transform_logits(rows.logits.double(), **rows.transform)
    tolerances = stats_tolerances(truth, dtype, rows.vocab, z.abs().mean())
    tolerances["logps"] = logp_tolerance(truth.logps, dtype, rows.vocab)
    for name, tolerance in tolerances.items():
        values = [getattr(stats, name) for stats in (ours, theirs, truth)]
        # a share of the softmax is off by as much as z
        off = acc_eps(dtype) * 4 * rows.z_max * (1 + values[2].detach().abs())
        assert_rule(name, *values, tolerance + off)
    assert torch.equal(ours.is_top1, truth.is_top1)

    coefficients = torch.randn(rows.labels.shape, device=z.device, dtype=torch.float64)
    coefficients = coefficients.float().double()
    grads = [
        torch.autograd.grad((stats.logps * coefficients).sum(), leaf)[0]
        for stats, leaf in ((theirs, leaves[0]), (truth, leaves[1]))
    ]
    c_error = acc_eps(dtype) * 4 * rows.z_max
    if softcap := rows.transform.get("softcap"):
        # tanh's complement is off by 6 * 2^-24 of itself, the derivative by that over 1 - tanh
        c_error += 3 * acc_eps(dtype) * math.exp(2 * rows.logits.abs().max().item() / softcap)
    tolerance = gradient_tolerance(grads[1], target, dtype, rows.vocab, c_error)
    ours = backward(target, rows, tokens, coefficients.flatten())
    assert_rule("gradient", ours, *grads, tolerance)


@pytest.mark.parametrize(("dtype", "transform"), MIXED, ids=str)
def test_shards_add_up_to_the_whole(target, dtype, transform):
    check(target, make_rows(target, dtype, **transform))


@BOTH
def test_long_shards(target, dtype):
    """Rows of which every shard is shared by several programs or warps."""
    check(target, make_rows(target, dtype, LONG_SIZES, seqs=2, length=3, packed=True))


@BOTH
def test_one_shard_of_all_has_the_bits_of_no_shard(target, dtype):
    rows = make_rows(target, dtype, (1003,), packed=True, shift=False)
    whole, (shard,) = forward(target, rows.whole), (forward(target, b) for b in rows.shards)
    logps, row_max, log_sum = whole.tokens
    z = shard.tokens[0]
    assert_same_bits(shard.tokens[1:], whole.tokens[1:])
    assert_same_bits(shard.stats, whole.stats)
    assert_same_bits(shard.is_top1, whole.is_top1)
    assert_same_bits((z - row_max) - log_sum, logps)


def test_a_vocabulary_of_unknown_size(target):
    """A rank that has not met the others yet; every backend takes the number that stands for it."""
    rows = make_rows(target, torch.float32, seqs=2, length=3, shift=False)
    known = rows.shards[1]
    unknown = forward(target, replace(known, vocab_total=UNKNOWN_TOTAL))
    assert_same_bits(unknown.tokens, forward(target, known).tokens)


@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_a_confident_token_keeps_its_digits(target, temperature):
    """A log-prob near -1e-9, whatever the shard of the label and however z is rounded."""
    rows = make_rows(target, torch.float32, temperature=temperature)
    labels = rows.labels.clamp(min=0)
    shifted = labels.roll(-1).unsqueeze(-1)
    rows.logits.scatter_(-1, shifted, 31.7 * temperature)
    outs = [forward(target, batch) for batch in rows.shards]
    tokens, _ = merge(rows, outs)
    scored = rows.scored
    truth = rows.reference(rows.logits.double()).logps.flatten()
    assert (truth[scored] > -1e-6).all()
    roundings = 8 + 2 * math.log2(rows.vocab) + 4 * 32 * (temperature != 1.0)
    relative = (tokens[0] / truth - 1)[scored].abs()
    assert relative.max() < acc_eps(torch.float32) * roundings


def test_infinities_of_a_shard(target):
    """-inf takes a shard out; NaN and +inf in one make the whole row NaN; nothing left is NaN."""
    rows = make_rows(target, torch.float32, seqs=8, length=1, shift=False)
    x, labels = rows.logits.flatten(0, 1), rows.labels.view(-1)
    labels.copy_(torch.tensor([0, 1, 600, 502, 503, 2, 1002, 504]))
    x[0, 3:503] = -math.inf
    x[1, :3] = -math.inf
    x[1, 1] = 2.0
    x[2, 503:504] = -math.inf
    x[2, 600] = -math.inf
    x[3, :502] = -math.inf
    x[3, 503:] = -math.inf
    x[4, 900] = math.nan
    x[5, 2] = math.inf
    x[6, 600] = math.inf
    x[7] = -math.inf
    outs = [forward(target, batch) for batch in rows.shards]
    for batch, out in zip(rows.shards, outs, strict=True):
        empty = batch.logits.isneginf().all(-1).flatten()
        assert out.tokens[1, empty].isneginf().all() and not out.tokens[2, empty].any()
        assert not out.stats[[0, 2]][:, empty].any() and out.stats[1, empty].isneginf().all()
        assert not out.is_top1[elsewhere(rows, batch)].any()
    tokens, _ = merge(rows, outs)
    truth = rows.reference(rows.logits.double()).logps.flatten()
    torch.testing.assert_close(tokens[0], truth, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert truth.isnan().tolist() == [False] * 4 + [True] * 4
    grad = backward(target, rows, tokens, torch.ones(8, device=x.device)).flatten(0, 1)
    assert grad[4:].isnan().all()
    leaf = rows.logits.detach().double().requires_grad_()
    rows.reference(leaf).logps.flatten()[:4].sum().backward()
    finite = leaf.grad.flatten(0, 1)[[0, 1, 3]]
    torch.testing.assert_close(grad[[0, 1, 3]].double(), finite, rtol=1e-5, atol=1e-6)


# the first has a column in its lower 32 bits
@pytest.mark.parametrize("bad", (2**32 + 5, 1003, -(2**63), -7), ids=str)
def test_a_label_of_no_shard_makes_its_row_nan(target, bad):
    if backend_module(target.backend).CHECKS_LABELS:
        pytest.skip("stops before it writes anything")
    rows = make_rows(target, torch.float32, seqs=2, length=3, shift=False)
    rows.labels[0, 1] = bad
    outs = [forward(target, batch) for batch in rows.shards]
    for out in (forward(target, rows.whole), *outs):
        assert out.tokens[0].isnan().tolist() == [False, True, False, False, False, False]
    tokens, _ = merge(rows, outs)
    assert tokens.isnan().any(0).tolist() == [False, True, False, False, False, False]
    grad = backward(target, rows, tokens, torch.ones(6, device=tokens.device)).flatten(0, 1)
    assert grad.isnan().any(-1).tolist() == tokens.isnan().any(0).tolist()
    assert grad[1].isnan().all()
