"""Random preference batches with the shape of real ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference

IGNORE = -100


@dataclass(frozen=True)
class Problem:
    """The arguments of one dpo_loss call; logits are ``[2P, T, V]``, or ``[N, V]`` when packed."""

    logits: Tensor
    labels: Tensor
    reference_logps: Tensor  # [2P]
    cu_seqlens: Tensor | None
    beta: float = 0.1

    @property
    def pairs(self) -> int:
        return self.reference_logps.shape[0] // 2

    @property
    def scored_tokens(self) -> int:
        lengths = reference.sequence_lengths(self.labels, cu_seqlens=self.cu_seqlens)
        return int(lengths.sum())

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """What dpo_loss takes after the logits."""
        return self.labels, *self.reference_logps.chunk(2)

    @property
    def options(self) -> dict:
        return {"beta": self.beta, "cu_seqlens": self.cu_seqlens}

    def pair(self, index: int) -> tuple[Tensor, Problem]:
        """(rows, the pair alone): its rows of ``logits`` and the batch that they make."""
        both = torch.tensor([index, self.pairs + index], device=self.labels.device)
        rows, cu_seqlens = both, None
        if self.cu_seqlens is not None:
            bounds = self.cu_seqlens.tolist()
            spans = [torch.arange(bounds[s], bounds[s + 1]) for s in both.tolist()]
            rows = torch.cat(spans).to(self.labels.device)
            lengths = torch.tensor([0, *map(len, spans)], device=self.labels.device)
            cu_seqlens = lengths.cumsum(0)
        alone = Problem(
            self.logits[rows], self.labels[rows], self.reference_logps[both], cu_seqlens, self.beta
        )
        return rows, alone


def make_problem(
    pairs: int,
    seq_len: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    packed: bool = False,
    ragged: bool = False,
    seed: int = 0,
) -> Problem:
    """A batch whose first half of every sequence is prompt; with ``ragged`` prompts differ and the
    ends are padded. Reference log-probs lie a few nats from the policy's."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (2 * pairs, seq_len)
    options = {"generator": generator, "device": device}
    logits = torch.randn(*shape, vocab, dtype=torch.float32, **options)
    # a row's own offset, as trained heads have one
    logits.mul_(2.0).add_(torch.randn(*shape, 1, **options))
    logits = logits.to(dtype)
    labels = torch.randint(vocab, shape, **options)
    position = torch.arange(seq_len, device=device)
    if ragged:
        prompts = torch.randint(1, max(2, seq_len // 2), (2 * pairs, 1), **options)
        ends = torch.randint(max(2, 3 * seq_len // 4), seq_len + 1, (2 * pairs, 1), **options)
    else:
        prompts = torch.full((2 * pairs, 1), seq_len // 2, device=device)
        ends = torch.full_like(prompts, seq_len)
    labels[(position < prompts) | (position >= ends)] = IGNORE
    # one sequence at a time: a whole float32 copy would set the peak memory of the benchmark
    logps = [
        reference.sequence_logps(logits[s : s + 1], labels[s : s + 1]) for s in range(2 * pairs)
    ]
    reference_logps = torch.cat(logps) + 3.0 * torch.randn(2 * pairs, **options)
    if not packed:
        return Problem(logits, labels, reference_logps, None)
    inside = position < ends
    lengths = torch.cat([torch.zeros(1, dtype=torch.int64, device=device), ends.flatten()])
    return Problem(logits[inside], labels[inside], reference_logps, lengths.cumsum(0))
