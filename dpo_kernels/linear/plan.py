"""Which rows of the hidden states enter the GEMMs, in which order, and which of them together.

A GPU is waited for once a pass, to learn how many tokens every sequence scores. Nobody waits while
a CUDA graph is captured, or where the caller promises how many are scored at most: rows that score
nothing may then enter too, behind the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_integer, validates
from ..sequences import SequenceLayout


class Group(NamedTuple):
    """Whole pairs, in one tile where their rows fit one."""

    pairs: slice
    rows: slice  # of the plan
    cu_seqlens: Tensor  # of these rows, the chosen answers before the rejected ones


@dataclass
class Plan:
    rows: Tensor  # of the hidden states, [n]
    labels: Tensor  # that they score, [n]; ignore_index where they score none
    shift: int
    groups: list[Group]  # none where pairs may be torn apart, or nothing is scored
    tile_rows: int  # at most
    # 0-d: NaN in a batch that scores more tokens than was promised, else 0; None: it scores no more
    fault: Tensor | None = None

    @cached_property
    def tokens(self) -> Tensor:
        """The numbers of the tokens that the rows score, [n]."""
        return self.rows + self.shift if self.shift else self.rows

    def blank(self, like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What holds 0 where no row of the plan writes to, NaN after a broken promise."""
        if self.fault is None or dtype == torch.bool:
            return like.new_zeros(shape, dtype=dtype)
        return self.fault.to(dtype).expand(shape).clone(memory_format=torch.contiguous_format)


def check_promise(max_scored_tokens: Any) -> int | None:
    name = "max_scored_tokens"
    return None if max_scored_tokens is None else check_integer(name, max_scored_tokens, 0)


def make_plan(
    layout: SequenceLayout, promised: int | None, rows: int, most_rows: int, whole_pairs: bool
) -> Plan:
    """``promised``: max_scored_tokens; ``rows``: of a tile; ``most_rows``: of one that needs more
    for a pair that is to stay together."""
    device = layout.labels.device
    looks = promised is None or _free_to_look(device) or validates()
    make = _counted if looks and not _captures_graph(device) else _uncounted
    return make(layout, promised, rows, most_rows, whole_pairs)


def _captures_graph(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _free_to_look(device: torch.device) -> bool:
    """Whether nobody waits for a number to be read."""
    return device.type == "cpu"


def _counted(
    layout: SequenceLayout, promised: int | None, tile_rows: int, most_rows: int, whole_pairs: bool
) -> Plan:
    """The scored rows alone."""
    lengths, shift = layout.lengths.tolist(), int(layout.shift)
    count = sum(lengths)
    if promised is not None and count > promised:
        raise ValueError(
            f"max_scored_tokens: the batch scores {count} tokens, expected no more than "
            f"{promised}, as was promised"
        )
    rows, groups = _scored_first(layout)[1][:count], []
    if whole_pairs:
        rows, groups, tile_rows = _by_groups(rows, lengths, tile_rows, most_rows, _copied)
    # what is scored has its own label
    return Plan(rows, layout.labels.flatten()[shift:][rows], shift, groups, tile_rows)


def _uncounted(
    layout: SequenceLayout, promised: int | None, tile_rows: int, most_rows: int, whole_pairs: bool
) -> Plan:
    """As many rows as may be scored: all of the batch, or with a promise no more, of all pairs
    together because nobody knows where one ends."""
    labels, shift, device = layout.scored_labels, int(layout.shift), layout.labels.device
    every = count = max(labels.numel() - shift, 0)
    groups, fault = [], None
    if layout.cu_seqlens is None and (promised is None or promised >= every):
        rows = torch.arange(every, device=device)
        lengths = [layout.labels.shape[1]] * layout.num_seqs
        # nothing scores the first token
        lengths[:1] = [max(length - shift, 0) for length in lengths[:1]]
        if whole_pairs:
            rows, groups, tile_rows = _by_groups(
                rows, lengths, tile_rows, most_rows, _evenly_spaced
            )
        return Plan(rows, labels[shift:][rows], shift, groups, tile_rows)
    is_scored, rows = _scored_first(layout)
    if promised is not None and promised < every:
        # one row at least, from which NaN reaches every gradient
        count = max(promised, 1)
        broken = is_scored[promised].view(torch.bool)
        fault = labels.new_zeros((), dtype=torch.float32).masked_fill_(broken, torch.nan)
        # out of range: the kernels make NaN of the row
        labels = labels.masked_fill(broken, -2 if layout.ignore_index == -1 else -1)
    rows = rows[:count]
    if whole_pairs and count:
        tile_rows = _rows_for([count], tile_rows, most_rows)
        bounds = F.pad(layout.lengths.cumsum(0), (1, 0)).clamp(max=count)
        groups = [Group(slice(0, layout.num_seqs // 2), slice(0, count), bounds)]
    return Plan(rows, labels[shift:][rows], shift, groups, tile_rows, fault)


def _scored_first(layout: SequenceLayout) -> tuple[Tensor, Tensor]:
    """(whether it scores, uint8, which row) of all rows that can score a token, each half rising.

    nonzero would wait.
    """
    scored = layout.scored[int(layout.shift) :].view(torch.uint8)
    values, indices = scored.sort(descending=True, stable=True)
    return values, indices


def _rows_for(sizes: list[int], rows: int, most_rows: int) -> int:
    """Of a tile that has room for the largest of what is to stay together, if there is so much."""
    return min(max(rows, *sizes, 1), most_rows)


def _members(sizes: list[int], limit: int) -> list[slice]:
    """The pairs of every group: of at most ``limit`` rows, or one pair that has more."""
    members, first, size = [], 0, 0
    for pair, own in enumerate(sizes):
        if size and own and size + own > limit:
            members.append(slice(first, pair))
            first, size = pair, 0
        size += own
    return [*members, slice(first, len(sizes))]


def _by_groups(
    rows: Tensor,
    lengths: list[int],
    tile_rows: int,
    most_rows: int,
    to_device: Callable[[list[list[int]], torch.device], Sequence[Tensor]],
) -> tuple[Tensor, list[Group], int]:
    """(the rows in the order of the groups, groups of whole pairs, the most rows of a tile).

    A pair that outgrows a tile has a group of its own. ``lengths``: the rows of every sequence.
    """
    pairs = len(lengths) // 2
    sizes = [a + b for a, b in zip(lengths[:pairs], lengths[pairs:], strict=True)]
    tile_rows = _rows_for(sizes, tile_rows, most_rows)
    if not rows.shape[0]:
        return rows, [], tile_rows
    members = _members(sizes, tile_rows)
    # of nearly the same size, where that makes no more of them: the largest takes the memory
    even = _members(sizes, min(max(-(-sum(sizes) // len(members)), *sizes), tile_rows))
    members = even if len(even) == len(members) else members
    halves = [slice(p.start + at, p.stop + at) for p in members for at in (0, pairs)]
    if len(members) > 1:
        starts = [0, *accumulate(lengths)]
        rows = torch.cat([rows[starts[half.start] : starts[half.stop]] for half in halves])
    bounds = [
        [0, *accumulate(lengths[chosen] + lengths[rejected])]
        for chosen, rejected in zip(halves[::2], halves[1::2], strict=True)
    ]
    ends = [0, *accumulate(each[-1] for each in bounds)]
    parts = map(slice, ends, ends[1:])
    groups = list(map(Group, members, parts, to_device(bounds, rows.device)))
    return rows, groups, tile_rows


def _copied(bounds: list[list[int]], device: torch.device) -> Sequence[Tensor]:
    """In one copy, for which nobody waits."""
    together = torch.tensor([x for each in bounds for x in each], device="cpu")
    return together.to(device, non_blocking=True).split(list(map(len, bounds)))


def _evenly_spaced(bounds: list[list[int]], device: torch.device) -> Sequence[Tensor]:
    """Without a copy from the host, which a captured graph would make again: the first sequence of
    a group may be shorter, the others are equal."""
    return [
        torch.arange(2 * x[1] - x[2], x[-1] + 1, x[2] - x[1], device=device).clamp_(min=0)
        for x in bounds
    ]
