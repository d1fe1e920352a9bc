"""The inputs that are timed: logits or hidden states, prompts masked as trainers mask them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitsShape:
    """``pairs`` pairs of ``tokens`` tokens each answer, over ``vocab`` logits."""

    pairs: int
    tokens: int
    vocab: int
    masked: float = 0.5
    dtype: torch.dtype = torch.bfloat16
    packed: bool = False

    @property
    def rows(self) -> int:
        return 2 * self.pairs * self.tokens

    @property
    def scored(self) -> int:
        return 2 * self.pairs * _answer_length(self.tokens, self.masked)

    def floor_bytes(self, backward: bool, inplace: bool = False) -> int:
        """Bytes that must move: scored rows read once a pass, every gradient row written once."""
        row = self.vocab * self.dtype.itemsize
        if not backward:
            return self.scored * row
        return (2 * self.scored + self.rows) * row


def _answer_length(tokens: int, masked: float) -> int:
    # the first token of a sequence has no row that scores it
    return min(tokens - round(tokens * masked), tokens - 1)


@dataclass
class LogitsProblem:
    """Tensors of a LogitsShape; ``logits`` requires a gradient."""

    shape: LogitsShape
    logits: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    reference_logps: Tensor  # [2P]

    @property
    def reference(self) -> tuple[Tensor, Tensor]:
        return self.reference_logps.chunk(2)


def make_labels(seqs: int, tokens: int, vocab: int, masked: float, device, generator) -> Tensor:
    """[seqs, tokens] labels whose first part, the prompt, is -100."""
    labels = torch.randint(vocab, (seqs, tokens), device=device, generator=generator)
    labels[:, : tokens - _answer_length(tokens, masked)] = -100
    return labels


def make_logits_problem(shape: LogitsShape, device: torch.device, seed: int = 0) -> LogitsProblem:
    generator = torch.Generator(device).manual_seed(seed)
    seqs = 2 * shape.pairs
    size = (seqs, shape.tokens, shape.vocab)
    logits = torch.empty(size, dtype=shape.dtype, device=device)
    # slice by slice: a whole float32 copy would not fit beside large logits
    for sequence in logits:
        sequence.copy_(torch.randn(sequence.shape, device=device, generator=generator) * 3)
    labels = make_labels(seqs, shape.tokens, shape.vocab, shape.masked, device, generator)
    cu_seqlens = None
    if shape.packed:
        logits, labels = logits.flatten(0, 1), labels.flatten()
        cu_seqlens = torch.arange(seqs + 1, device=device) * shape.tokens
    count = shape.scored // seqs
    reference_logps = -torch.rand(seqs, device=device, generator=generator) * count * 10
    return LogitsProblem(shape, logits.requires_grad_(), labels, cu_seqlens, reference_logps)


@dataclass(frozen=True)
class LinearShape:
    """``pairs`` pairs of ``tokens`` hidden states each answer, and a head ``[vocab, hidden]``."""

    pairs: int
    tokens: int
    hidden: int
    vocab: int
    masked: float = 0.5
    dtype: torch.dtype = torch.bfloat16
    trainable_head: bool = True
    # whether the reference's hidden states are given, which costs a head GEMM, or its log-probs
    reference_hidden: bool = False

    @property
    def scored(self) -> int:
        return 2 * self.pairs * _answer_length(self.tokens, self.masked)

    def gemm_flops(self) -> int:
        """One head GEMM over the scored rows."""
        return 2 * self.scored * self.hidden * self.vocab

    def floor_flops(self) -> int:
        """Three GEMMs with a trainable head, two with a frozen one; one more for the reference."""
        gemms = (3 if self.trainable_head else 2) + self.reference_hidden
        return gemms * self.gemm_flops()


@dataclass
class LinearProblem:
    """Tensors of a LinearShape."""

    shape: LinearShape
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    reference_logps: Tensor
    reference_hidden: Tensor

    @property
    def reference(self) -> dict[str, Tensor]:
        """The reference, as linear_dpo_loss takes it."""
        if self.shape.reference_hidden:
            return {"reference_hidden": self.reference_hidden}
        chosen, rejected = self.reference_logps.chunk(2)
        return {"reference_chosen_logps": chosen, "reference_rejected_logps": rejected}

    @property
    def inputs(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight) if x.requires_grad]


def make_linear_problem(shape: LinearShape, device: torch.device, seed: int = 0) -> LinearProblem:
    generator = torch.Generator(device).manual_seed(seed)
    seqs = 2 * shape.pairs

    def normal(*size: int, scale: float) -> Tensor:
        return torch.randn(size, device=device, generator=generator).mul_(scale).to(shape.dtype)

    hidden = normal(seqs, shape.tokens, shape.hidden, scale=1.0)
    # logits of standard deviation 3
    weight = normal(shape.vocab, shape.hidden, scale=3 * shape.hidden**-0.5)
    reference_hidden = hidden + normal(*hidden.shape, scale=0.1)
    labels = make_labels(seqs, shape.tokens, shape.vocab, shape.masked, device, generator)
    reference_logps = -torch.rand(seqs, device=device, generator=generator) * shape.tokens * 5
    return LinearProblem(
        shape,
        hidden.requires_grad_(),
        weight.requires_grad_(shape.trainable_head),
        labels,
        reference_logps,
        reference_hidden,
    )
