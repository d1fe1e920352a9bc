"""Tiles of logits that never outgrow a workspace, and the gradients that come out of them."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.batch import ForwardOutputs, GradOutput, PairLoss, TokenBatch
from ..checks import check_positive
from ..compat import process_group
from ..dispatch import resolve
from ..ops import make_outputs, run_backward, run_forward, token_results
from ..parallel.groups import add
from ..parallel.vocabulary import whole_rows
from ..sequences import SequenceLayout
from ..types import RowOptions, Tokens, accumulation_dtype
from . import gemm
from .plan import make_plan

# rows of a tile by default, from which the GEMMs run at full speed
_DEFAULT_ROWS = {"cpu": 640, "cuda": 1024}
# and where the weight has a gradient: each tile more reads and writes its float32 sum once more,
# which on a GPU takes as long as the GEMMs of 250 rows (by an H200's rates of copies and GEMMs)
_SUMMED_ROWS = {"cuda": 4096}
# of a GPU's memory, for a tile by default
_SHARE = 16
# a float32 chunk of the weight, where one is needed: smaller ones cost speed, larger ones memory
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
_CHUNK_COLUMNS = 8192
# rows that start at a multiple of 16 bytes are read and written in full vectors
_ALIGNED = 8


class HeadOptions(NamedTuple):
    """What the head's ops take beside tensors, in the order of their schema."""

    rows: RowOptions
    dtype: torch.dtype  # of the GEMMs' operands
    precision: str
    workspace: int  # bytes; 0: the default
    backend: str
    vocab_group: str = ""  # its group_name; "": the head is whole
    # of a tile, as the ranks of vocab_group agreed; 0: as the workspace has room for
    tile_rows: int = 0
    most_rows: int = 0
    promised: int | None = None  # max_scored_tokens

    @staticmethod
    def of(*flat) -> HeadOptions:
        return HeadOptions(RowOptions(*flat[:_NUM_ROW_OPTIONS]), *flat[_NUM_ROW_OPTIONS:])

    def flat(self) -> tuple:
        return (*self.rows, *self[1:])


_NUM_ROW_OPTIONS = len(RowOptions._fields)
NUM_OPTIONS = _NUM_ROW_OPTIONS + len(HeadOptions._fields) - 1


class Needs(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool


class Head(NamedTuple):
    """``logits = hidden @ weight.T + bias``, in the dtype of the GEMMs."""

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None, options: HeadOptions) -> Head:
        bias = None if bias is None else bias.detach().to(options.dtype)
        return Head(weight.detach().to(options.dtype), bias)


def _dtypes(options: HeadOptions, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """What a tile of logits and its gradient are kept in."""
    return (
        gemm.tile_dtype(options.dtype, options.precision),
        gemm.gradient_dtype(options.dtype, options.precision, device),
    )


def check_workspace(workspace_mb: Any) -> int:
    """Bytes; 0 for the default. DPO_KERNELS_WORKSPACE_MB is for calls that a trainer makes."""
    name = "workspace_mb"
    if workspace_mb is None:
        name = "DPO_KERNELS_WORKSPACE_MB"
        text = os.environ.get(name)
        if not text:
            return 0
        try:
            workspace_mb = float(text)
        except ValueError:
            raise ValueError(f"{name}: expected a number, got {text!r}") from None
    size = check_positive(name, workspace_mb) * 2**20
    # what an op's int argument holds
    if size >= 2**63:
        raise ValueError(f"{name}: expected MiB that a machine can have, got {workspace_mb}")
    return max(int(size), 1)


class TileSize(NamedTuple):
    rows: int
    most_rows: int  # for what has to stay together
    columns: int  # of the vocabulary that a GEMM takes where it takes not all


def tile_size(weight: Tensor, options: HeadOptions, sums_weight: bool) -> TileSize:
    """``sums_weight``: its gradient is made, for which larger tiles are better."""
    (vocab, hidden_size), device = weight.shape, weight.device
    dtype, gradient_dtype = _dtypes(options, device)
    per_logit = dtype.itemsize
    if gradient_dtype != dtype:
        per_logit += gradient_dtype.itemsize
    budget = options.workspace
    largest = _CHUNK_BYTES.get(device.type, 8 << 20)
    chunk = min(largest, budget // 8) if budget else largest
    columns = min(max(chunk // (4 * hidden_size), 1), _CHUNK_COLUMNS, vocab)
    scratch, one_row = (
        gemm.scratch_bytes(rows, columns, hidden_size, options.dtype, device) for rows in (0, 1)
    )
    per_row = one_row - scratch
    per_row += per_logit * (vocab + _ALIGNED)

    def rows_in(size: int) -> int:
        return max((size - scratch) // per_row, 1)

    rows = most = rows_in(budget) if budget else _DEFAULT_ROWS.get(device.type, 512)
    if not budget and device.type == "cuda":
        most = rows_in(torch.cuda.get_device_properties(device).total_memory // _SHARE)
        # to tear a pair apart costs nothing without that sum
        rows, most = (_SUMMED_ROWS["cuda"], most) if sums_weight else (rows, min(rows, most))
    most = min(most, options.most_rows or most)
    return TileSize(min(rows, options.tile_rows or rows, most), most, columns)


@dataclass
class Tile:
    """Rows of logits; the memory is the workspace's."""

    batch: TokenBatch
    part: slice  # of the plan
    hidden: Tensor  # [n, D]


class Workspace:
    """Room for one tile of logits and, where it needs a dtype of its own, its gradient."""

    def __init__(
        self,
        head: Head,
        layout: SequenceLayout,
        options: HeadOptions,
        sums_weight: bool,
        whole_pairs: bool = False,
    ):
        """``whole_pairs``: those that a tile has room for are not torn apart."""
        self.head = head
        self.options = options
        self.device = head.weight.device
        self.dtype, self.gradient_dtype = _dtypes(options, self.device)
        self.module = resolve(options.backend, self.device, self.dtype)
        self.vocab_group = process_group(options.vocab_group) if options.vocab_group else None
        size = tile_size(head.weight, options, sums_weight)
        self.columns = size.columns
        self.plan = make_plan(layout, options.promised, size.rows, size.most_rows, whole_pairs)
        self.count = self.plan.rows.shape[0]
        self._logits = self._gradient = self._one = None

    def split(self, rows: slice) -> list[slice]:
        """Tiles of nearly the same size."""
        count = rows.stop - rows.start
        tiles = -(-count // self.plan.tile_rows)
        bounds = [rows.start + count * i // tiles for i in range(tiles + 1)] if tiles else [0]
        return [slice(a, b) for a, b in itertools.pairwise(bounds)]

    def _room(self, dtype: torch.dtype) -> Tensor:
        """For the largest tile of whichever way the rows are split."""
        spans = (slice(0, self.count), *(group.rows for group in self.plan.groups))
        parts = itertools.chain.from_iterable(map(self.split, spans))
        rows = max(part.stop - part.start for part in parts)
        if self.device.type == "cuda":
            # in eighths of a power of two: a size of its own for every batch would have torch's
            # allocator keep a block of each
            step = max(1 << rows.bit_length() >> 4, 1)
            rows = min(-(-rows // step) * step, self.plan.tile_rows)
        vocab = self.head.weight.shape[0]
        width = -(-vocab // _ALIGNED) * _ALIGNED
        room = torch.empty((rows, width), dtype=dtype, device=self.device)
        if dtype == self.gradient_dtype:
            # GEMMs that load whole vectors read past the last column, whatever they make of it
            room[:, vocab:].zero_()
        return room[:, :vocab]

    def release(self) -> None:
        """Frees the tile, for what comes after the last one."""
        self._logits = self._gradient = None

    def fill(
        self,
        hidden: Tensor,
        part: slice,
        cu_seqlens: Tensor | None = None,
        head: Head | None = None,
    ) -> Tile:
        """The logits of a part of the plan's rows of ``hidden`` [R, D]."""
        if self._logits is None:
            self._logits = self._room(self.dtype)
        picked = hidden.index_select(0, self.plan.rows[part]).to(self.options.dtype)
        logits, labels = self._logits[: picked.shape[0]], self.plan.labels[part]
        gemm.logits_into(logits, picked, *(head or self.head), self.columns)
        if cu_seqlens is None:
            logits, labels = logits.unsqueeze(0), labels.unsqueeze(0)
        options = self.options.rows
        batch = TokenBatch(
            logits,
            labels,
            cu_seqlens,
            options.ignore_index,
            False,
            options.scale,
            options.softcap,
            options.temperature,
            options.vocab_start,
            options.vocab_total,
        )
        return Tile(batch, part, picked)

    def forward(self, tile: Tile, stats: bool) -> Tokens:
        """Of a head that is split over ranks the whole rows' results: one collective."""
        batch = tile.batch
        out = run_forward(self.module, batch, None, make_outputs(batch, stats=stats))
        own = token_results(batch, out)
        if self.vocab_group is None:
            return own
        scored = batch.labels[0] != batch.ignore_index
        columns, total = batch.logits.shape[-1], batch.vocab_total
        return whole_rows(self.vocab_group, own, columns, total, scored)

    def forward_sequences(
        self, tile: Tile, pair: PairLoss | None, stats: bool, average: bool
    ) -> tuple[ForwardOutputs, Tensor]:
        """(outputs, seqs): with the sums over the tile's sequences, and its pairs' loss."""
        seqs, pairs = (2, False) if pair is None else (3, True)
        out = make_outputs(tile.batch, stats=stats, seqs=seqs, pairs=pairs, average=average)
        run_forward(self.module, tile.batch, pair, out)
        assert out.seqs is not None
        return out, out.seqs

    def backward(self, tile: Tile, tokens: Tensor, grad: Tensor | None, index: str) -> Tensor:
        """dlogits [n, V] for ``grad``, that of the log-probs (None: 1), by "token" or "sequence".

        They overwrite the logits unless they need a dtype of their own.
        """
        logits = tile.batch.logits
        stride = 1
        if grad is None:
            if self._one is None:
                self._one = logits.new_ones(1, dtype=accumulation_dtype(self.dtype))
            grad, stride = self._one, 0
        grad_output = GradOutput(grad.contiguous(), stride, index, None)
        target = logits
        if self.gradient_dtype != self.dtype:
            if self._gradient is None:
                self._gradient = self._room(self.gradient_dtype)
            target = self._gradient[: tile.hidden.shape[0]].view(logits.shape)
        # a backend that writes any dtype saves a pass over the tile
        written = target if self.module.CASTS_GRADIENT else logits
        run_backward(self.module, tile.batch, tokens.contiguous(), grad_output, written, True)
        if written is not target:
            target.copy_(written)
        return target.flatten(0, -2)


class HeadGradients:
    """Sums over tiles of the gradients asked for, each in the widest dtype it needs."""

    def __init__(
        self, space: Workspace, hidden: Tensor, needs: Needs, held: torch.dtype, unit: float = 1.0
    ):
        """``unit``: a power of two near the largest gradients of log-probs that are to come."""
        weight = space.head.weight
        total = accumulation_dtype(weight.dtype)
        self.space = space
        self._unit = unit if space.gradient_dtype == torch.float16 else 1.0
        self._held = held
        # a rank's part of a sum over ranks is not rounded before it is added
        held = held if space.vocab_group is None else accumulation_dtype(held)
        self.hidden = space.plan.blank(hidden, hidden.shape, held) if needs.hidden else None
        self.weight = weight.new_empty(weight.shape, dtype=total) if needs.weight else None
        self.bias = weight.new_zeros(weight.shape[0], dtype=total) if needs.bias else None
        self._first = True

    def add(self, tile: Tile, tokens: Tensor, grad: Tensor | None, index: str = "token") -> None:
        """One tile, whose logits become dlogits, for the gradient ``grad`` of its log-probs: one a
        row, one a sequence of the tile with ``index`` "sequence", or 1 (None)."""
        space, factors, batch = self.space, None, tile.batch
        if grad is not None and space.gradient_dtype == torch.float16:
            # float16 cannot hold a small grad times a small probability: it multiplies the rows,
            # in units in which it is not small itself
            if index == "sequence":
                layout = SequenceLayout(batch.labels, batch.cu_seqlens, batch.ignore_index, False)
                grad = layout.spread(grad)
            grad, factors, index = None, grad.unsqueeze(-1), "token"
        dlogits = space.backward(tile, tokens, grad, index)
        if self.hidden is not None:
            wide = None if space.vocab_group is None else self.hidden.dtype
            rows = gemm.hidden_gradient(dlogits, space.head.weight, space.columns, wide)
            rows = rows if factors is None else rows * factors
            self.hidden.index_copy_(0, space.plan.rows[tile.part], rows.to(self.hidden.dtype))
        if self.weight is not None:
            hidden = tile.hidden
            if factors is not None:
                hidden = (hidden * (factors / self._unit)).to(hidden.dtype)
            gemm.add_weight_gradient(self.weight, dlogits, hidden, self._first, space.columns)
            self._first = False
        if self.bias is not None and factors is None:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)
        elif self.bias is not None and factors is not None:
            bias, factors = self.bias.unsqueeze(-1), (factors / self._unit).to(dlogits.dtype)
            gemm.add_weight_gradient(bias, dlogits, factors, False, space.columns)

    def scale(self, factors: Tensor) -> None:
        """What was added for a gradient of 1 becomes that for ``factors``, of every row."""
        if self.hidden is not None:
            self.hidden.mul_(factors.unsqueeze(-1))

    def hidden_total(self) -> Tensor | None:
        """Of a head that is split over ranks the sum over them: one collective."""
        group, hidden = self.space.vocab_group, self.hidden
        if hidden is None or group is None:
            return hidden
        index = self.space.plan.rows
        if self.space.count:
            rows = add("vocab_group", group, "the gradient of hidden", hidden[index])
            hidden.index_copy_(0, index, rows)
        return hidden.to(self._held)

    def weight_total(self) -> Tensor | None:
        if self.weight is not None and self._first:
            self.weight.zero_()
            self._first = False
        return self._in_units(self.weight)

    def bias_total(self) -> Tensor | None:
        return self._in_units(self.bias)

    def _in_units(self, total: Tensor | None) -> Tensor | None:
        return total if total is None or self._unit == 1.0 else total.mul_(self._unit)
