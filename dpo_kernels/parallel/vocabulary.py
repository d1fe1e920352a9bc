"""Rows whose vocabulary is split over ranks: what each rank knows of them, merged.

Rank r of a group of R has the columns behind those of ranks 0 .. r - 1. For every token it gives
``z_r``, the label's z or 0 where another rank has it, ``m_r``, the maximum of its columns, and
``s_r = log sum exp(z - m_r)``. One all-gather later every rank has, with M = max m_r, h the first
rank with m_h = M, and z = sum z_r::

    log_sum = log1p(expm1(s_h) + sum over the other ranks of exp(m_r - M + s_r))
    logp    = (z - M) - log_sum

The maximum's own 1 stays out of the sum, as on one device, so that a token that the model is sure
of keeps its digits. Every rank computes this from the same numbers in the same order: the results
have the same bits on all of them, in every run.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_values, validates
from ..sequences import SequenceLayout
from ..types import Tokens
from .groups import gather

# what kernels are told of a vocabulary whose size only the exchange tells: more than any has
UNKNOWN_TOTAL = 2**30 - 1

# keeps a sum of logits finite where they are
_SMALLER = 2.0**-24

# the columns of every rank, where this rank has seen them
_columns: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()


def merge(parts: Tensor, total: Tensor | int, scored: Tensor) -> Tokens:
    """The whole rows' results from those of R ranks, ``[R, 3 or 7, N]`` as ``stacked`` makes them.

    ``total``: the size of the vocabulary.
    """
    label_z, row_max, log_sums = parts[:, 0], parts[:, 1], parts[:, 2]
    top, first = row_max.max(0, keepdim=True)
    distance = row_max - top
    others = (distance + log_sums).exp().scatter(0, first, log_sums.gather(0, first).expm1())
    # rows without a finite maximum have no number
    log_sum = (others.sum(0) + distance.gather(0, first)[0]).log1p()
    logp = (label_z.sum(0) - top[0]) - log_sum
    tokens = _where(scored, torch.stack((logp, top[0], log_sum)))
    if parts.shape[1] == 3:
        return Tokens(tokens, tokens.new_empty((3, 0)), torch.empty_like(scored[:0]))
    entropies, sums, log_squares, is_top1 = parts[:, 3:].unbind(1)
    # the logarithm of a rank's share of the probability
    log_share = distance + log_sums - log_sum
    share = log_share.exp()
    # 0, not 0 * inf, for a rank without a chance
    entropy = _where(share != 0, share * (entropies - log_share)).sum(0)
    log_sum_sq = (2 * log_share + log_squares).logsumexp(0)
    mean = sums.sum(0) / total / _SMALLER
    stats = _where(scored, torch.stack((entropy, mean, log_sum_sq)))
    return Tokens(tokens, stats, scored & (is_top1.gather(0, first)[0] == 1))


def stacked(part: Tokens, columns: int) -> Tensor:
    """``[3 or 7, N]``: what a rank sends; the sum of its logits, scaled, instead of their mean."""
    tokens, stats, is_top1 = part
    if stats.numel() == 0:
        return tokens
    sums = stats[1] * (_SMALLER * columns)
    own = (stats[0], sums, stats[2], is_top1.to(tokens.dtype))
    return torch.cat((tokens, torch.stack(own)))


def whole_rows(group: Any, own: Tokens, columns: int, total: int, scored: Tensor) -> Tokens:
    """The whole rows' results, where every rank knows already what columns the others have."""
    gathered = gather("vocab_group", group, "row sums", stacked(own, columns))
    return merge(gathered, total, scored)


def meet(
    group: Any, columns: int, rows: int, most_rows: int, device: torch.device
) -> tuple[int, int, int, int]:
    """(this rank's first column, the vocabulary, and the least ``rows`` and ``most_rows`` of any
    rank)."""
    own = torch.tensor([columns, rows, most_rows], device=device)
    found = gather("vocab_group", group, "columns", own).tolist()
    counts, each_rows, each_most = zip(*found, strict=True)
    return sum(counts[: group.rank()]), sum(counts), min(each_rows), min(each_most)


def _where(condition: Tensor, values: Tensor) -> Tensor:
    return values.masked_fill(~condition, 0)


def token_forward(
    group: Any, layout: SequenceLayout, columns: int, run: Callable[[int], Tokens]
) -> tuple[Tokens, int]:
    """(the whole rows' results, this rank's first column); ``run(start)`` gives this rank's own.

    Where a rank's columns start depends on those of the ranks before it, which it knows from an
    earlier call. Their number travels with every exchange, so that a rank that has the first or
    another number of columns than before costs a second exchange at most. On a CPU all ranks look
    at the numbers. On a GPU a rank that has as many as before does not wait to look, and rows are
    NaN where the others have not.
    """
    rank, device = group.rank(), layout.labels.device
    expected = _columns.get(group)
    free = _free_to_look(device)
    looks = free or validates() or not expected or expected[rank] != columns
    # the first guess is an even split
    expected = [*expected] if expected else [columns] * group.size()
    expected[rank] = columns
    while True:
        start = sum(expected[:rank])
        local = stacked(run(start), columns)
        note = _note(columns, start, looks, device, local.dtype)
        gathered = gather("vocab_group", group, "row sums", torch.cat((local.flatten(), note)))
        parts, notes = gathered.tensor_split((local.numel(),), dim=1)
        notes = notes.contiguous().view(torch.int64)
        if not looks:
            break
        found = notes.tolist()
        expected = [count for count, _, _ in found]
        if all(first == sum(expected[:r]) for r, (_, first, _) in enumerate(found)):
            _columns[group] = expected
            check_values(layout, sum(expected), False)
            break
        if not all(looked for _, _, looked in found):
            raise ValueError(
                f"vocab_group: the ranks hold {expected} columns, which not all of them expected; "
                "on a GPU a vocabulary that is split in another way takes another process group"
            )
    counts, firsts, _ = notes.unbind(1)
    merged = merge(parts.reshape(-1, *local.shape), counts.sum(), layout.scored)
    return merged if free else _with_nan(merged, layout, counts, firsts), start


def _free_to_look(device: torch.device) -> bool:
    """Whether nobody waits for a number to be read."""
    return device.type == "cpu"


@functools.lru_cache(maxsize=64)
def _note(
    columns: int, start: int, looks: bool, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """What travels with the sums, bit by bit."""
    with torch.inference_mode(False):
        return torch.tensor([columns, start, looks], device=device).view(dtype)


def _with_nan(merged: Tokens, layout: SequenceLayout, counts: Tensor, firsts: Tensor) -> Tokens:
    """NaN where a label is out of range, and everywhere when the ranks' columns do not adjoin."""
    ends, labels = counts.cumsum(0), layout.scored_labels
    wrong = (labels < 0) | (labels >= ends[-1]) | (firsts + counts != ends).any()
    wrong &= layout.scored
    tokens, stats, is_top1 = merged
    if stats.numel():
        stats = stats.masked_fill(wrong, torch.nan)
    return Tokens(tokens.masked_fill(wrong, torch.nan), stats, is_top1 & ~wrong[: is_top1.numel()])
