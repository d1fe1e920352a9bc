"""The same input gives the same bits: run after run, in any batch, layout and packing."""

from __future__ import annotations

import pytest
import torch

from tests.entries import assert_all_same_bits, loss_of, make_entry, packings, results, sources
from tests.helpers import LAYOUTS, assert_same_bits, make_problem
from tests.test_parity import gradient


@packings
@sources
def test_same_bits_twice(target, source, packed):
    # a head takes several tiles
    options = {} if source == "logits" else {"workspace_mb": 0.05}
    entry = make_entry(source, target, pairs=3, vocab=301, packed=packed, seed=20)

    def run():
        out = entry.dpo_loss(reduction="none", **options)
        values = (out.losses, out.chosen_logps, out.rejected_logps, *entry.token_stats())
        return (*values, *entry.gradients(out.loss.sum()))

    assert_all_same_bits(run(), run())


def alone(problem, pair: int, length: int | None = None):
    """Pair number ``pair``, padded with masked rows of NaN to ``length``."""
    rows = [pair, pair + len(problem.reference[0])]
    logits, labels = problem.logits.detach()[rows], problem.labels[rows]
    if length is not None:
        more = length - labels.shape[1]
        logits = torch.nn.functional.pad(logits, (0, 0, 0, more), value=float("nan"))
        labels = torch.nn.functional.pad(labels, (0, more), value=-100)
    out = problem.with_logits(logits)
    out.labels = labels
    out.reference = tuple(x[pair : pair + 1] for x in problem.reference)
    return out


# 67: a row in one segment; 33000: in several, which a small batch may spread over several blocks
@pytest.mark.parametrize("vocab", (67, 33_000))
def test_same_bits_alone_and_in_a_batch(target, vocab):
    """And whatever padding the longest sequence of a batch brings."""
    if target.backend == "torch":
        pytest.skip("torch picks the order of its sums by the shape of the batch")
    length = 4 if vocab == 67 else 2
    problem = make_problem(target, pairs=3, length=length, vocab=vocab, scored=1.0, seed=21)
    whole = loss_of(problem, target.backend, reduction="none")
    grad = gradient(problem, whole.loss.sum())
    for pair, padded_to in ((0, None), (2, None), (1, length + 3)):
        one = alone(problem, pair, padded_to)
        out = loss_of(one, target.backend, reduction="none")
        for name in ("losses", "chosen_logps", "rejected_logps", "chosen_rewards"):
            assert_same_bits(getattr(out, name), getattr(whole, name)[pair : pair + 1])
        assert_same_bits(gradient(one, out.loss.sum())[:, :length], grad[[pair, pair + 3]])


def test_same_bits_padded_and_packed(target):
    if target.backend == "torch":
        pytest.skip("torch picks the order of its sums by the shape of the batch")
    padded = make_problem(target, pairs=2, length=6, scored=0.8, seed=22)
    lengths = torch.tensor([6, 3, 5, 1], device=target.device)
    inside = torch.arange(6, device=target.device) < lengths[:, None]
    padded.labels[~inside] = -100
    packed = padded.with_logits(padded.logits.detach()[inside])
    packed.labels = padded.labels[inside]
    packed.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    outs = [loss_of(p, target.backend, reduction="none") for p in (padded, packed)]
    assert_same_bits(outs[0].losses, outs[1].losses)
    grads = [gradient(p, out.loss.sum()) for p, out in zip((padded, packed), outs, strict=True)]
    assert_same_bits(grads[0][inside], grads[1])


# 1024: rows that start at a multiple of 16 bytes, but not where the vocabulary is sliced
@pytest.mark.parametrize("vocab", (131, 1024))
def test_same_bits_whatever_the_layout(target, vocab):
    """Alignment, and so the width of loads, changes nothing, unless the backend is Triton's."""
    first, *others = (
        results(make_problem(target, layout=layout, vocab=vocab, seed=24), target.backend)
        for layout in LAYOUTS
    )
    for layout, other in zip(LAYOUTS[1:], others, strict=True):
        if target.backend == "triton" and vocab == 1024 and layout == "sliced vocabulary":
            # other columns are added up in a thread
            assert not all(torch.equal(a, b) for a, b in zip(other, first, strict=True))
            for a, b in zip(other, first, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert_all_same_bits(other, first)
