"""The batches that are checked and timed: random values in the shape of real preference data."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .. import reference

IGNORE = -100


@dataclass(frozen=True)
class Shape:
    """``pairs`` pairs of at most ``tokens`` tokens a sequence, over ``vocab`` logits.

    With ``hidden``, hidden states of that size and a head ``[vocab, hidden]`` instead of logits.
    ``scored`` is the share of a sequence's tokens that belong to the answer. ``lengths`` overrides
    it: (prompt, whole) tokens of each of the 2P sequences.
    """

    pairs: int
    tokens: int
    vocab: int
    hidden: int | None = None
    scored: float = 0.5
    lengths: tuple[tuple[int, int], ...] | None = None
    dtype: torch.dtype = torch.float32
    packed: bool = False
    trainable_head: bool = True
    # whether the reference's hidden states are given, which costs a head GEMM, or its log-probs
    reference_hidden: bool = False
    softcap: float | None = None
    loss_type: str = "sigmoid"
    # standard deviation of the logits
    std: float = 2.0
    model: str = ""

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(first scored token, end) of each sequence; no logit scores a sequence's first token."""
        whole = self.tokens
        lengths = self.lengths or ((whole - round(whole * self.scored), whole),) * (2 * self.pairs)
        return tuple((max(prompt, 1), end) for prompt, end in lengths)

    @property
    def rows(self) -> int:
        if self.packed:
            return sum(end for _, end in self.spans)
        return 2 * self.pairs * self.tokens

    @property
    def scored_tokens(self) -> int:
        return sum(end - start for start, end in self.spans)

    @property
    def scored_share(self) -> float:
        return self.scored_tokens / (2 * self.pairs * self.tokens)

    @property
    def size(self) -> tuple[int, ...]:
        middle = () if self.hidden is None else (self.hidden,)
        return (2 * self.pairs, self.tokens, *middle, self.vocab)

    def label(self) -> str:
        parts = [self.model or "", "x".join(map(str, self.size)), dtype_name(self.dtype)]
        parts += [f"{self.scored_share:.0%} scored", "packed" if self.packed else ""]
        if self.hidden is not None:
            parts.append("trainable head" if self.trainable_head else "frozen head")
        if self.softcap:
            parts.append(f"softcap {self.softcap:g}")
        if self.loss_type != "sigmoid":
            parts.append(self.loss_type)
        return " ".join(filter(None, parts))

    def floor_bytes(self, backward: bool) -> int:
        """Scored rows are read once a pass; every row of the gradient is written once."""
        row = self.vocab * self.dtype.itemsize
        if not backward:
            return self.scored_tokens * row
        return (2 * self.scored_tokens + self.rows) * row

    def floor_flops(self, backward: bool) -> int:
        """One head GEMM forward; two backward, one with a frozen head; one for the reference."""
        gemms = 1 + (1 + self.trainable_head) * backward + self.reference_hidden
        return gemms * 2 * self.scored_tokens * (self.hidden or 0) * self.vocab


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ragged_lengths(pairs: int, tokens: int, seed: int = 0) -> tuple[tuple[int, int], ...]:
    """Prompts up to half of ``tokens``, and ends that leave up to a quarter as padding."""
    rng = random.Random(seed)
    prompts = [rng.randrange(1, max(2, tokens // 2)) for _ in range(2 * pairs)]
    return tuple((p, rng.randint(max(p, 3 * tokens // 4), tokens)) for p in prompts)


@dataclass(frozen=True)
class Problem:
    """Tensors of a Shape: ``logits`` ``[2P, T, V]`` or ``[N, V]``, or ``hidden`` and ``weight``."""

    shape: Shape
    labels: Tensor
    reference_logps: Tensor  # [2P]
    cu_seqlens: Tensor | None = None
    logits: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    reference_hidden: Tensor | None = None
    beta: float = 0.1

    @property
    def device(self) -> torch.device:
        return self.labels.device

    @property
    def source(self) -> Tensor:
        """The logits or the hidden states, whichever there are."""
        source = self.hidden if self.logits is None else self.logits
        assert source is not None
        return source

    @property
    def head(self) -> Tensor:
        assert self.weight is not None
        return self.weight

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What gradients are taken of, by name."""
        if self.logits is not None:
            return {"logits": self.logits}
        head = {"weight": self.head} if self.shape.trainable_head else {}
        return {"hidden": self.source, **head}

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """The tensors that dpo_loss or linear_dpo_loss takes first."""
        if self.logits is not None:
            return self.logits, self.labels
        return self.source, self.head, self.labels

    @cached_property
    def options(self) -> dict:
        options = {"beta": self.beta, "cu_seqlens": self.cu_seqlens}
        options["loss_type"] = self.shape.loss_type
        if self.reference_hidden is not None:
            options["reference_hidden"] = self.reference_hidden
        else:
            chosen, rejected = self.reference_logps.chunk(2)
            options |= {"reference_chosen_logps": chosen, "reference_rejected_logps": rejected}
        if self.shape.softcap:
            options["logit_softcap"] = self.shape.softcap
        return options

    def trainable(self, copy: bool = False) -> Problem:
        """The problem with inputs that require a gradient, on the same memory or on a copy."""
        take = torch.clone if copy else torch.Tensor.detach
        leaves = {k: take(v.detach()).requires_grad_() for k, v in self.inputs.items()}
        return replace(self, **leaves)

    def restore(self, source: Problem) -> None:
        """Puts the inputs of ``source`` back where an in-place backward has written."""
        with torch.no_grad():
            for name, value in self.inputs.items():
                value.detach().copy_(source.inputs[name])


@torch.no_grad()
def make_problem(shape: Shape, device: torch.device | str, seed: int = 0) -> Problem:
    """Reference log-probs lie a few nats from the policy's, so that no pair is already decided."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    seqs = 2 * shape.pairs

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator)

    labels = torch.full((seqs, shape.tokens), IGNORE, device=device)
    for row, (start, end) in zip(labels, shape.spans, strict=True):
        row[start:end] = torch.randint(
            shape.vocab, (end - start,), device=device, generator=generator
        )
    tensors = {}
    if shape.hidden is None:
        tensors["logits"] = logits = torch.empty(shape.size, dtype=shape.dtype, device=device)
        # one sequence at a time: a whole float32 copy would set the peak memory
        for sequence in logits:
            # a row's own offset, as trained heads have one
            offset = normal(shape.tokens, 1)
            sequence.copy_(normal(*sequence.shape).mul_(shape.std).add_(offset))
    else:
        states = normal(seqs, shape.tokens, shape.hidden)
        head = normal(shape.vocab, shape.hidden).mul_(shape.std * shape.hidden**-0.5)
        tensors["hidden"], tensors["weight"] = states.to(shape.dtype), head.to(shape.dtype)
        if shape.reference_hidden:
            tensors["reference_hidden"] = (states + 0.1 * normal(*states.shape)).to(shape.dtype)
    logps = [
        reference.sequence_logps(
            _logits_of(tensors, shape.softcap, s).unsqueeze(0), labels[s : s + 1]
        )
        for s in range(seqs)
    ]
    reference_logps = torch.cat(logps).float() + 3.0 * normal(seqs)
    problem = Problem(shape, labels, reference_logps, **tensors)
    return _pack(problem) if shape.packed else problem


def _logits_of(tensors: dict[str, Tensor], softcap: float | None, sequence: int) -> Tensor:
    if "logits" in tensors:
        return tensors["logits"][sequence]
    logits = tensors["hidden"][sequence] @ tensors["weight"].t()
    return logits if softcap is None else softcap * torch.tanh(logits.float() / softcap)


def _pack(problem: Problem) -> Problem:
    shape, device = problem.shape, problem.device
    ends = torch.tensor([end for _, end in shape.spans], device=device)
    inside = torch.arange(shape.tokens, device=device) < ends[:, None]
    rows = ("labels", "logits", "hidden", "reference_hidden")
    packed = {k: getattr(problem, k)[inside] for k in rows if getattr(problem, k) is not None}
    cu_seqlens = torch.nn.functional.pad(ends.cumsum(0), (1, 0))
    return replace(problem, cu_seqlens=cu_seqlens, **packed)
