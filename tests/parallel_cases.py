"""A call that is split over ranks: what each rank is given, and its results put together again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tests.entries import Entry, make_entry
from tests.helpers import CPU, IGNORE, Target
from tests.parallel_world import Member, counted


@dataclass(frozen=True)
class Case:
    """``sizes``: the columns of the ranks; ``ends``: where their slices of a sequence end.

    With both there are two ranks of each, four in all.
    """

    function: str = "token_stats"
    source: str = "logits"
    dtype: torch.dtype = torch.float32
    backend: str = "cpu"
    sizes: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    length: int = 8
    packed: bool = False
    kind: str = "random"
    options: dict = field(default_factory=dict)
    make: dict = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return max(len(self.sizes), 1) * max(len(self.ends), 1)

    def entry(self) -> Entry:
        """The whole problem, the same on every rank."""
        vocab = sum(self.sizes) or 67
        options = {"length": self.length, "vocab": vocab, "packed": self.packed, **self.make}
        entry = make_entry(self.source, Target(self.backend, "cpu"), self.dtype, **options)
        if self.kind == "random":
            return entry
        return KINDS[self.kind](entry, self.sizes)

    def place(self, rank: int) -> tuple[int, int]:
        """(which columns, which slice) a rank has."""
        if self.sizes and self.ends:
            return rank % 2, rank // 2
        return (rank, 0) if self.sizes else (0, rank)

    def groups(self, member: Member) -> dict[str, Any]:
        if self.sizes and self.ends:
            return {"vocab_group": member.row, "sequence_group": member.column}
        return {"vocab_group" if self.sizes else "sequence_group": member.first[self.ranks]}


def borders(entry: Entry, sizes: tuple[int, ...]) -> Entry:
    """The labels are every shard's first and last column in turn."""
    ends = torch.tensor(sizes).cumsum(0)
    edges = torch.stack((ends - torch.tensor(sizes), ends - 1), 1).flatten()
    turn = edges[torch.arange(entry.labels.numel()) % edges.numel()].view(entry.labels.shape)
    return replace(entry, labels=turn.where(entry.labels != IGNORE, IGNORE))


def closed(entry: Entry, sizes: tuple[int, ...]) -> Entry:
    """One shard after the other has no chance, label or not; some rows have a single column."""
    logits = entry.inputs[0].detach().clone()
    rows, labels = logits.view(-1, logits.shape[-1]), entry.labels.flatten()
    ends = torch.tensor(sizes).cumsum(0).tolist()
    for row in range(rows.shape[0]):
        shard = row % len(sizes)
        rows[row, ends[shard] - sizes[shard] : ends[shard]] = -torch.inf
        if row % 5 == 4 and labels[row] != IGNORE:
            rows[row] = -torch.inf
            rows[row, labels[row]] = 1.0
    return entry.with_inputs(logits.requires_grad_())


def confident(entry: Entry, sizes: tuple[int, ...]) -> Entry:
    """Labels 15, 20 and 40 nats above the others, on every shard."""
    logits = entry.inputs[0].detach() / 8
    margin = torch.tensor([15.0, 20.0, 40.0], dtype=logits.dtype)
    chosen = borders(entry, sizes)
    index = chosen.labels.clamp(min=0).unsqueeze(-1)
    above = margin[torch.arange(index.numel()) % 3].view(index.shape)
    return chosen.with_inputs(logits.scatter_add(-1, index, above).requires_grad_())


def ties(entry: Entry, sizes: tuple[int, ...]) -> Entry:
    """The maximum lies in many columns, of several shards; every label is one of them."""
    logits = entry.inputs[0].detach().sign()
    chosen = borders(entry, sizes)
    index = chosen.labels.clamp(min=0).unsqueeze(-1)
    return chosen.with_inputs(logits.scatter(-1, index, 1.0).requires_grad_())


KINDS = {"borders": borders, "closed": closed, "confident": confident, "ties": ties}


def columns_of(entry: Entry, sizes: tuple[int, ...], rank: int) -> Entry:
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    if len(entry.inputs) == 1:
        return entry.with_inputs(entry.inputs[0][..., own])
    hidden, weight, bias = entry.inputs
    return entry.with_inputs(hidden, weight[own], bias[own])


def rows_of(entry: Entry, ends: tuple[int, ...], rank: int) -> Tensor:
    """The numbers of a rank's tokens: of each sequence from its end before to its own."""
    first = ends[rank - 1] if rank else 0
    if entry.cu_seqlens is None:
        seqs, length = entry.labels.shape
        return (torch.arange(seqs)[:, None] * length + torch.arange(first, ends[rank])).flatten()
    starts, stops = entry.cu_seqlens[:-1, None], entry.cu_seqlens[1:, None]
    tokens = starts + torch.arange(first, ends[rank])
    return tokens[tokens < stops]


def slices_of(entry: Entry, ends: tuple[int, ...], rank: int) -> Entry:
    """Labels are aligned first, as a trainer has to."""
    aligned = torch.nn.functional.pad(entry.labels[..., 1:], (0, 1), value=IGNORE)
    rows, labels, cu_seqlens = rows_of(entry, ends, rank), aligned, entry.cu_seqlens
    if cu_seqlens is None:
        shape = (labels.shape[0], rows.numel() // labels.shape[0])
    else:
        labels = labels.clone()
        labels[cu_seqlens[1:] - 1] = IGNORE
        inside = (rows[:, None] >= cu_seqlens[:-1]) & (rows[:, None] < cu_seqlens[1:])
        cu_seqlens = torch.nn.functional.pad(inside.sum(0).cumsum(0), (1, 0))
        shape = (rows.numel(),)
    first = entry.inputs[0]
    cut = first.reshape(-1, first.shape[-1])[rows].view(*shape, first.shape[-1])
    labels = labels.flatten()[rows].view(shape)
    return replace(entry, inputs=(cut, *entry.inputs[1:]), labels=labels, cu_seqlens=cu_seqlens)


def shard_of(case: Case, entry: Entry, rank: int) -> Entry:
    columns, part = case.place(rank)
    own = columns_of(entry, case.sizes, columns) if case.sizes else entry
    own = slices_of(own, case.ends, part) if case.ends else own
    leaves = (
        x.detach().clone().requires_grad_(whole.requires_grad)
        for x, whole in zip(own.inputs, entry.inputs, strict=True)
    )
    return own.with_inputs(*leaves)


@dataclass
class Outcome:
    outputs: dict[str, Tensor]
    gradients: list[Tensor]
    # the collectives of the forward and of the backward
    forward: list[str]
    backward: list[str]


def outputs_of(out) -> dict[str, Tensor]:
    if isinstance(out, Tensor):
        return {"logps": out}
    if isinstance(out, tuple) and not hasattr(out, "_asdict"):
        (output, stats) = out
        return {**outputs_of(output), **outputs_of(stats)}
    names = getattr(out, "_fields", None) or ("loss", *type(out).__dataclass_fields__)
    return {name: getattr(out, name) for name in names}


def weights_of(out: Tensor) -> Tensor:
    """A gradient for each element, in the reach of every dtype."""
    return torch.linspace(0.5, 2.0, out.numel(), dtype=torch.float64).view(out.shape)


def call(case: Case, entry: Entry, weights: Tensor | None = None, **groups) -> Outcome:
    """``weights``: the gradient of the first output, where it is not to be weights_of."""
    options = {**case.options, **groups}
    if case.ends and groups:
        options["shift"] = False
    with counted() as forward:
        out = outputs_of(getattr(entry, case.function)(**options))
    first = next(iter(out.values()))
    weights = weights_of(first) if weights is None else weights
    with counted() as backward:
        gradients = entry.gradients(first, weights.to(first.dtype))
    return Outcome(
        {name: x.detach() for name, x in out.items()}, list(gradients), forward, backward
    )


def run(member: Member, case: Case) -> Outcome:
    """Twice: the bits are the same again."""
    entry = case.entry()
    own, weights = shard_of(case, entry, member.rank), None
    if case.ends and case.function.startswith("token"):
        whole = weights_of(entry.labels)
        rows = rows_of(entry, case.ends, case.place(member.rank)[1])
        weights = whole.flatten()[rows].view(own.labels.shape)
    made, again = (call(case, own, weights, **case.groups(member)) for _ in range(2))
    for name, value in made.outputs.items():
        assert same_bits(value, again.outputs[name]), name
    assert all(map(same_bits, made.gradients, again.gradients))
    # shards of new sizes cost an exchange more the first time
    return again


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (x.contiguous().flatten().view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def together(case: Case, outcomes: list[Outcome]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The outputs, which are the same on every rank, and the gradients of the whole problem."""
    first, of_slice = outcomes[0], {}
    for rank, other in enumerate(outcomes):
        # a head makes as many tiles as a slice of the tokens needs
        made = (other.forward, other.backward)
        assert of_slice.setdefault(case.place(rank)[1], made) == made
        for name, value in first.outputs.items():
            assert same_bits(value, other.outputs[name]), name
    return first.outputs, whole_gradients(case, outcomes)


def whole_gradients(case: Case, outcomes: list[Outcome]) -> list[Tensor]:
    entry = case.entry()
    made = []
    for i, leaf in enumerate(entry.leaves):
        # a rank of both groups has a slice of a shard
        gradient = torch.zeros_like(leaf)
        by_columns = (i == 0) == (len(entry.inputs) == 1)
        for rank, outcome in enumerate(outcomes):
            columns, part = case.place(rank)
            own, target = outcome.gradients[i], gradient
            if case.sizes and by_columns:
                start = sum(case.sizes[:columns])
                dim = -1 if i == 0 else 0
                target = gradient.narrow(dim, start, case.sizes[columns])
            if case.ends and i == 0:
                rows = rows_of(entry, case.ends, part)
                flat = gradient.view(-1, leaf.shape[-1])
                start = sum(case.sizes[:columns]) if case.sizes and by_columns else 0
                flat[rows, start : start + own.shape[-1]] = own.reshape(rows.numel(), own.shape[-1])
            elif case.ends:
                # of a head each slice has a part
                target += own
            elif case.sizes and not by_columns:
                assert same_bits(own, outcomes[0].gradients[i])
                target.copy_(own)
            else:
                target.copy_(own)
        made.append(gradient)
    return made


def one_process(case: Case, target: Target = CPU) -> Outcome:
    """The same call without groups."""
    return call(case, case.entry())
