"""What a step costs, as formulas: the memory of its loss, what ranks exchange, the head's GEMMs.

Nothing here is measured. tests/test_scaling.py holds the formulas to collectives that are counted
and to peaks that are measured on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .linear import gemm
from .linear.workspace import HeadOptions, TileSize, tile_size
from .types import RowOptions, accumulation_dtype

# log_softmax, its gradient and that of the gather behind it, in float32 whatever the logits are
NAIVE_COPIES = 3
_FLOAT, _DOUBLE, _INT = 4, 8, 8
_CPU = torch.device("cpu")


class Collective(NamedTuple):
    """``bytes``: the parts of all ranks, as every rank has them afterwards, or had them before."""

    kind: str
    bytes: int

    def sent(self, ranks: int) -> int:
        """What a rank sends, and receives, where the collective is made in a ring."""
        passes = 2 if self.kind == "all_reduce" else 1
        return passes * self.bytes * (ranks - 1) // ranks


def vocab_group_from_logits(tokens: int, ranks: int) -> list[Collective]:
    """Forward; the backward has none. Maximum, log-sum and label's logit of every token of the
    batch in float32, and three integers that say which columns a rank has."""
    return [Collective("all_gather", ranks * (3 * _FLOAT * tokens + 3 * _INT))]


def vocab_group_from_hidden(
    scored: int, hidden_size: int, ranks: int, tiles: int
) -> list[Collective]:
    """Of scored tokens alone: an all-gather a tile, one of the sizes, and the sum of dhidden.

    ``tiles``: how often tiles of logits are made, those of reference_hidden among them.
    """
    sizes = Collective("all_gather", ranks * 3 * _INT)
    per_tile = -(-scored // max(tiles, 1))
    rows = [min(per_tile, scored - i * per_tile) for i in range(tiles)]
    gathers = [Collective("all_gather", ranks * 3 * _FLOAT * n) for n in rows]
    return [sizes, *gathers, Collective("all_reduce", _FLOAT * scored * hidden_size)]


def sequence_group(pairs: int, ranks: int) -> list[Collective]:
    """Forward; the backward has none. Sum and length of every sequence, in float64."""
    return [Collective("all_gather", ranks * 2 * 2 * pairs * _DOUBLE)]


def sharded_head(
    vocab: int, hidden_size: int, ranks: int, dtype: torch.dtype, trainable: bool
) -> list[Collective]:
    """A head that FSDP2 shards, in shards of the same size: once a call.

    The gradient is reduced in the head's dtype, unless the engine is told another.
    """
    rows = -(-vocab // ranks) * ranks
    size = rows * hidden_size * dtype.itemsize
    gather = [Collective("all_gather", size)]
    return gather + [Collective("reduce_scatter", size)] * trainable


def gathered_logits(tokens: int, vocab: int, dtype: torch.dtype) -> Collective:
    """What a loss over whole rows would exchange of logits whose vocabulary is split."""
    return Collective("all_gather", tokens * vocab * dtype.itemsize)


@dataclass(frozen=True)
class Step:
    """One loss on one rank. ``scored``: the share of tokens that score."""

    pairs: int
    tokens: int
    vocab: int
    hidden: int = 4096
    dtype: torch.dtype = torch.bfloat16
    scored: float = 1.0
    tp: int = 1
    cp: int = 1
    # of a tile of logits; None: what a CPU takes, 640 rows
    workspace_mb: float | None = None

    @property
    def rows(self) -> int:
        """Tokens on this rank."""
        return 2 * self.pairs * -(-self.tokens // self.cp)

    @property
    def scored_rows(self) -> int:
        return math.ceil(self.rows * self.scored)

    @property
    def columns(self) -> int:
        """Of the vocabulary, on this rank."""
        return -(-self.vocab // self.tp)

    # from logits

    def naive_from_logits(self) -> int:
        """Log-probs of the whole rows by log_softmax and gather, forward and backward.

        Where the vocabulary is split the rows have been gathered first.
        """
        logits = self.rows * self.vocab
        gathered = logits * self.dtype.itemsize if self.tp > 1 else 0
        return NAIVE_COPIES * accumulation_dtype(self.dtype).itemsize * logits + gathered

    def from_logits(self, inplace: bool = False) -> int:
        """The gradient; a CPU touches no memory of it for rows that score nothing."""
        return 0 if inplace else self.rows * self.columns * self.dtype.itemsize

    # from hidden states

    def naive_from_hidden(self) -> int:
        """As from logits, which are free again by the time of the peak, and the hidden states'."""
        return self.naive_from_logits() + self.rows * self.hidden * self.dtype.itemsize

    def from_hidden(self, trainable: bool) -> int:
        """The larger of two peaks: the end of the forward, and the returned gradients."""
        item, wide = self.dtype.itemsize, accumulation_dtype(self.dtype).itemsize
        hidden, weight = self.rows * self.hidden, self.columns * self.hidden * trainable
        # a rank's part of a sum over ranks is kept wide, and its scored rows are sent from a copy
        held = hidden * (item if self.tp == 1 else wide)
        sent = self.scored_rows * self.hidden * wide if self.tp > 1 else 0
        # in another dtype than its sum, the gradient of the head is a copy beside it; by then the
        # tile is free
        made = max(sum(self._tile()), sent, weight * item * (item != wide))
        forward = held + weight * wide + made
        return max(forward, 2 * (hidden + weight) * item)

    def _tile(self) -> tuple[int, int]:
        """A tile of logits, which its gradient overwrites, and the scratch memory of its GEMMs."""
        size = self._tile_size()
        tiles = -(-self.scored_rows // size.rows)
        rows = -(-self.scored_rows // max(tiles, 1))
        logits = rows * self.columns * gemm.tile_dtype(self.dtype, "exact").itemsize
        return logits, gemm.scratch_bytes(rows, size.columns, self.hidden, self.dtype, _CPU)

    def tiles(self, trainable: bool) -> int:
        """Of the forward: for a trainable head of whole pairs, where a tile has room for one."""
        most = self._tile_size().rows
        if not trainable or self.cp > 1:
            return -(-self.scored_rows // most)
        pair = -(-self.scored_rows // self.pairs)
        at_once = most // pair
        return -(-self.pairs // at_once) if at_once else self.pairs * -(-pair // most)

    def _tile_size(self) -> TileSize:
        # no more than a shape: one element, however large
        weight = torch.empty((), dtype=self.dtype).expand(self.columns, self.hidden)
        workspace = 0 if self.workspace_mb is None else int(self.workspace_mb * 2**20)
        rows = RowOptions(-100, True, 1.0, 0.0, 1.0)
        return tile_size(weight, HeadOptions(rows, self.dtype, "exact", workspace, ""), True)

    # GEMMs

    def gemms(self, trainable: bool, reference: bool = True) -> int:
        """Of the head, by linear_dpo_loss; with split sequences the logits are made twice."""
        return (3 + (self.cp > 1) if trainable else 2) + reference

    def gemm_flops(self, trainable: bool, reference: bool = True) -> int:
        one = 2 * self.scored_rows * self.hidden * self.columns
        return self.gemms(trainable, reference) * one
