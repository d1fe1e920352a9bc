"""Heads to score with: hidden states, weight and bias, and how far results may be off the truth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_kernels.linear import gemm
from tests.helpers import IGNORE, Target, acc_eps, eps

CPU = Target("cpu", "cpu")


@dataclass
class HeadProblem:
    """A batch of pairs as a model's last layer leaves it; hidden, weight and bias are leaves."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    cu_seqlens: Tensor | None
    reference_hidden: Tensor
    reference_logps: tuple[Tensor, Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    @property
    def trainable(self) -> list[Tensor]:
        return [x for x in self.leaves if x.requires_grad]

    @property
    def head(self) -> dict:
        return {"bias": self.bias, "cu_seqlens": self.cu_seqlens}

    def to(self, dtype: torch.dtype) -> HeadProblem:
        def leaf(x):
            return None if x is None else x.detach().to(dtype).requires_grad_(x.requires_grad)

        return HeadProblem(
            *map(leaf, (self.hidden, self.weight, self.bias)),
            self.labels,
            self.cu_seqlens,
            self.reference_hidden.to(dtype),
            tuple(x.to(torch.promote_types(dtype, torch.float32)) for x in self.reference_logps),
        )


def make_head(
    target: Target = CPU,
    dtype: torch.dtype = torch.float32,
    *,
    pairs: int = 3,
    length: int = 6,
    vocab: int = 67,
    hidden_size: int = 24,
    packed: bool = False,
    frozen: bool = False,
    bias: bool = True,
    scored: float = 0.7,
    seed: int = 0,
) -> HeadProblem:
    """Logits of standard deviation 3 or so; packed sequences have lengths 1 to ``length``."""
    rng = torch.Generator().manual_seed(seed)
    num_seqs, cu_seqlens, shape = 2 * pairs, None, (2 * pairs, length)
    if packed:
        lengths = torch.randint(1, length + 1, (num_seqs,), generator=rng)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(target.device)
        shape = (int(lengths.sum()),)

    def draw(*size, std):
        values = std * torch.randn(*size, generator=rng, dtype=torch.float64)
        return values.to(target.device, dtype)

    hidden, ref_hidden = (draw(*shape, hidden_size, std=1.0) for _ in range(2))
    weight = draw(vocab, hidden_size, std=3 / math.sqrt(hidden_size))
    offset = draw(vocab, std=1.0) if bias else None
    labels = torch.randint(vocab, shape, generator=rng)
    masked = torch.rand(shape, generator=rng) > scored
    logps = 3 * torch.randn(2, pairs, generator=rng) - 8
    logps = logps.to(target.device, torch.promote_types(dtype, torch.float32))
    return HeadProblem(
        hidden.requires_grad_(),
        weight.requires_grad_(not frozen),
        None if offset is None else offset.requires_grad_(not frozen),
        labels.masked_fill(masked, IGNORE).to(target.device),
        cu_seqlens,
        ref_hidden,
        (logps[0], logps[1]),
    )


def with_gradients(function, problem: HeadProblem, *args, **kwargs):
    """(outputs, gradients of the leaves that want one) of the sum of the first output."""
    out = function(problem.hidden, problem.weight, problem.labels, *args, **kwargs)
    first = getattr(out, "loss", out)
    return out, torch.autograd.grad(first.sum(), problem.trainable)


def logp_error(problem: HeadProblem, dtype: torch.dtype) -> float:
    """How far a token's log-prob may be off: what a sum of D rounded products errs, twice.

    A dot product of length D errs by at most D eps sum |h w|; log-prob is a difference of two
    functions of logits, each 1-Lipschitz in their maximum norm. Exact logits are kept in float32.
    """
    hidden, weight = problem.hidden.detach().double(), problem.weight.detach().double()
    size = hidden.shape[-1]
    largest = (hidden.abs().flatten(0, -2) @ weight.abs().t()).max().item()
    return acc_eps(dtype) * (2 * (size + 1) * largest + 8 + 2 * math.log2(weight.shape[0]) + 80)


def gradient_error(truth: Tensor, others: Tensor, target: Target, dtype: torch.dtype) -> Tensor:
    """How far a gradient may be off: stored twice in its dtype, summed in float32.

    ``others`` bounds the sum of |terms| of every element. On a GPU dlogits are rounded to the dtype
    before their GEMM, on a CPU they stay in float32.
    """
    inner = eps(dtype) if target.device == "cuda" else 256 * acc_eps(dtype)
    info = torch.finfo(dtype)
    return 1.1 * eps(dtype) * truth.abs() + inner * others + info.smallest_normal


class GemmLog:
    """Every GEMM of the head as (kind, rows)."""

    def __init__(self, monkeypatch):
        self.calls: list[tuple[str, int]] = []
        for name, rows in (
            ("logits_into", lambda tile, *_: tile.shape[0]),
            ("hidden_gradient", lambda gradient, *_: gradient.shape[0]),
            ("add_weight_gradient", lambda total, gradient, *_: gradient.shape[0]),
        ):
            monkeypatch.setattr(gemm, name, self._logged(getattr(gemm, name), name, rows))

    def _logged(self, function, name, rows):
        def wrapped(*args):
            self.calls.append((name, rows(*args)))
            return function(*args)

        return wrapped

    def rows(self) -> dict[str, int]:
        """Rows that went through each kind of GEMM; the log starts again."""
        total: dict[str, int] = {}
        for name, rows in self.calls:
            total[name] = total.get(name, 0) + rows
        self.calls.clear()
        return total
