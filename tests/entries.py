"""A batch and the calls that score it, from logits or from hidden states."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import dpo_kernels
from tests.helpers import CPU, Target, assert_same_bits, make_problem
from tests.linear_helpers import make_head

SOURCES = ("logits", "trained head", "frozen head")
sources = pytest.mark.parametrize("source", SOURCES)
packings = pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))


@dataclass
class Entry:
    """``inputs`` are the logits, or hidden states, weight and bias of a head."""

    inputs: tuple[Tensor, ...]
    labels: Tensor
    cu_seqlens: Tensor | None
    reference: tuple[Tensor, Tensor]
    backend: str | None

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in self.inputs if x.requires_grad]

    def with_inputs(self, *inputs: Tensor) -> Entry:
        return replace(self, inputs=inputs)

    def _call(self, name: str, *arguments, **options):
        options = {"backend": self.backend, **options}
        if len(self.inputs) == 1:
            return getattr(dpo_kernels, name)(*self.inputs, self.labels, *arguments, **options)
        hidden, weight, bias = self.inputs
        function = getattr(dpo_kernels, f"linear_{name}")
        return function(hidden, weight, self.labels, *arguments, bias=bias, **options)

    def token_logps(self, **options) -> Tensor:
        return self._call("token_logps", **options)

    def token_stats(self, **options):
        return self._call("token_stats", **options)

    def sequence_logps(self, **options) -> Tensor:
        return self._call("sequence_logps", cu_seqlens=self.cu_seqlens, **options)

    def dpo_loss(self, **options):
        return self._call("dpo_loss", *self.reference, cu_seqlens=self.cu_seqlens, **options)

    def gradients(self, output: Tensor, grad_output=None, **options) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, self.leaves, grad_output, **options)


def make_entry(
    source: str,
    target: Target = CPU,
    dtype: torch.dtype = torch.float32,
    *,
    pairs: int = 2,
    length: int = 4,
    **options,
) -> Entry:
    options = {"pairs": pairs, "length": length, **options}
    if source == "logits":
        p = make_problem(target, dtype, **options)
        return Entry((p.logits,), p.labels, p.cu_seqlens, p.reference, target.backend)
    p = make_head(target, dtype, frozen=source == "frozen head", **options)
    inputs = (p.hidden, p.weight, p.bias)
    return Entry(inputs, p.labels, p.cu_seqlens, p.reference_logps, target.backend)


def assert_all_same_bits(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        assert_same_bits(x, y)


def loss_of(problem, backend, logits=None, **options):
    """dpo_loss of a problem, or of other logits in its place."""
    logits = problem.logits if logits is None else logits
    options = {**problem.layout, "backend": backend, **options}
    return dpo_kernels.dpo_loss(logits, problem.labels, *problem.reference, **options)


def results(problem, backend, **options):
    """Losses, log-probs, statistics and both gradients."""
    out = loss_of(problem, backend, reduction="none", **options)
    stats = dpo_kernels.token_stats(problem.logits, problem.labels, backend=backend)
    return (
        out.losses,
        out.chosen_logps,
        out.rejected_logps,
        *stats,
        *torch.autograd.grad(out.loss.sum(), problem.logits),
        *torch.autograd.grad(stats.logps.sum(), problem.logits),
    )
