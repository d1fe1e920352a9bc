"""Whether a loss and its gradients are right on the very input that is timed.

The truth is float64, made block by block of rows, so that a problem which fills the memory can be
checked. The error of a gradient is its worst row: ``max_r |g_r - t_r| / max_r |t_r|`` in the
2-norm. Plain PyTorch in the dtype of the input, on the same blocks, gives the error to compare
with.

- exact: error <= plain error + a few eps of float32 (and one rounding of a stored gradient);
- fast: the logits may be rounded to the dtype of the input. An error of eps in a logit moves the
  loss by ``4 beta sqrt(n) eps``, with n the scored tokens of the longest pair, and gradients by as
  much again, relative, beside four times plain PyTorch's error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import reference
from ..types import accumulation_dtype
from .problems import IGNORE, Problem

EXACT, FAST = "exact", "fast"
# (rows, their gradient), block by block
Blocks: TypeAlias = Iterator[tuple[Tensor, Tensor]]
# logits of one block of rows, in elements
_BLOCK = 1 << 25
# losses of the mean log-prob of a sequence
_BY_LENGTH = ("ipo", "sigmoid_norm", "simpo")
_LENGTHS = ("chosen_lengths", "rejected_lengths")


class Check(NamedTuple):
    """Errors of one quantity."""

    ours: float
    torch: float
    tolerance: float

    @property
    def passed(self) -> bool:
        # false for NaN too
        return self.ours <= self.torch + self.tolerance


class _Rows(NamedTuple):
    """The flat rows that score a token, the labels they score, and their sequences."""

    index: Tensor
    labels: Tensor
    sequence: Tensor


class Gate:
    """The truth of one problem; ``check`` holds a contender's results to it."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.rows = _scoring_rows(problem)
        dtype = problem.shape.dtype
        self._plain = _Pass(problem, self.rows, dtype)
        self._truth = _Pass(problem, self.rows, torch.float64)
        self.loss = self._truth.loss
        self._dense = self._truth.dense_gradients()
        plain = self._plain
        self._plain_errors = self._gradient_errors(plain.dense_gradients(), plain.row_gradients())
        # gigabytes, and of no more use
        self._plain.weight = self._truth.weight = None

    def check(self, loss: Tensor, gradients: dict[str, Tensor], precision: str) -> dict[str, Check]:
        errors = self._gradient_errors(gradients)
        error = abs(float(loss) - self.loss)
        plain_error = abs(self._plain.loss - self.loss)
        of_loss, of_gradient, factor = self._tolerances(precision)
        checks = {"loss": Check(error, plain_error, of_loss)}
        for name, value in errors.items():
            checks[name] = Check(value, factor * self._plain_errors[name], of_gradient)
        return checks

    def _tolerances(self, precision: str) -> tuple[float, float, float]:
        """(of the loss, of gradients, factor on plain PyTorch's gradient error)."""
        dtype, beta = self.problem.shape.dtype, self.problem.beta
        stored = torch.finfo(dtype).eps
        eps = torch.finfo(accumulation_dtype(dtype)).eps
        largest = float(self._truth.sequence_logps.abs().max())
        # two log-probs enter a log-ratio, each good to 2 eps
        of_logit = 4 * beta * eps * largest
        if precision == EXACT:
            return 2 * eps * abs(self.loss) + of_logit, stored + 8 * eps + of_logit, 1.0
        lengths = torch.bincount(self.rows.sequence, minlength=2 * self.problem.shape.pairs)
        longest = float((lengths.view(2, -1).sum(0)).max())
        of_logit += 4 * beta * longest**0.5 * stored
        return 2 * eps * abs(self.loss) + of_logit, 4 * stored + of_logit, 4.0

    def _gradient_errors(
        self, found: dict[str, Tensor], blocks: Blocks | None = None
    ) -> dict[str, float]:
        if self.problem.logits is not None:
            return {"logits": self._logits_error(blocks or found["logits"])}
        return {
            name: _row_error(found[name].flatten(0, -2), truth)
            for name, truth in self._dense.items()
        }

    def _logits_error(self, gradient: Tensor | Blocks) -> float:
        """Row by row; a gradient of a row that scores nothing counts whole."""
        worst = torch.zeros((), dtype=torch.float64, device=self.problem.device)
        largest = worst.clone()
        found = gradient.flatten(0, -2) if isinstance(gradient, Tensor) else gradient
        for index, truth in self._truth.row_gradients():
            got = found[index] if isinstance(found, Tensor) else next(found)[1]
            # torch.maximum keeps NaN, the built-in max may drop it
            worst = torch.maximum(worst, (got.double() - truth).norm(dim=-1).max())
            largest = torch.maximum(largest, truth.norm(dim=-1).max())
        if isinstance(found, Tensor):
            unscored = torch.ones(len(found), dtype=torch.bool, device=found.device)
            unscored[self.rows.index] = False
            for index in unscored.nonzero().squeeze(-1).split(_rows_a_block(self.problem)):
                worst = torch.maximum(worst, found[index].double().norm(dim=-1).max())
        return float(worst / largest.clamp_min(torch.finfo(torch.float64).tiny))


def _row_error(found: Tensor, truth: Tensor) -> float:
    worst = (found.double() - truth).norm(dim=-1).max()
    return float(worst / truth.norm(dim=-1).max().clamp_min(torch.finfo(torch.float64).tiny))


class _Pass:
    """Loss and gradients of a problem in one dtype, by blocks of rows."""

    def __init__(self, problem: Problem, rows: _Rows, dtype: torch.dtype):
        self.problem, self.rows, self.dtype = problem, rows, dtype
        self.weight = None if problem.weight is None else problem.weight.detach().to(dtype)
        shape, beta = problem.shape, problem.beta
        logps = self._sequence_logps(problem.source).requires_grad_()
        if problem.reference_hidden is not None:
            base = self._sequence_logps(problem.reference_hidden)
        else:
            base = problem.reference_logps.to(logps.dtype)
        counts = {}
        if shape.loss_type in _BY_LENGTH:
            lengths = torch.bincount(rows.sequence, minlength=2 * shape.pairs)
            counts = dict(zip(_LENGTHS, lengths.chunk(2), strict=True))
        losses = reference.preference_loss(
            *logps.chunk(2), *base.chunk(2), beta=beta, loss_type=shape.loss_type, **counts
        )[0]
        loss = losses.mean()
        # dloss/d(log-prob), of a sequence and so of each of its tokens
        (self.scale,) = torch.autograd.grad(loss, logps)
        self.loss, self.sequence_logps = float(loss.detach()), logps.detach()

    def _blocks(self) -> Iterator[_Rows]:
        size = _rows_a_block(self.problem)
        parts = zip(*(x.split(size) for x in self.rows), strict=True)
        return (_Rows(*part) for part in parts)

    def _logps(self, rows: Tensor, labels: Tensor) -> Tensor:
        softcap = self.problem.shape.softcap
        logits = rows if self.weight is None else rows @ self.weight.t()
        if softcap:
            logits = softcap * torch.tanh(logits.to(accumulation_dtype(self.dtype)) / softcap)
        return reference.token_logps(logits, labels)

    @torch.no_grad()
    def _sequence_logps(self, source: Tensor) -> Tensor:
        out = torch.zeros(
            2 * self.problem.shape.pairs,
            dtype=accumulation_dtype(self.dtype),
            device=self.problem.device,
        )
        source = source.detach().flatten(0, -2)
        for block in self._blocks():
            rows = source[block.index].to(self.dtype)
            out.index_add_(0, block.sequence, self._logps(rows, block.labels))
        return out

    def row_gradients(self) -> Blocks:
        """Of the logits or hidden states."""
        source = self.problem.source.detach().flatten(0, -2)
        for block in self._blocks():
            rows = source[block.index].to(self.dtype).requires_grad_()
            wanted = (rows,)
            if self.weight is not None and self.problem.shape.trainable_head:
                self.weight.requires_grad_()
                wanted = (rows, self.weight)
            logps = self._logps(rows, block.labels)
            found = torch.autograd.grad(logps, wanted, self.scale[block.sequence].to(logps.dtype))
            self._of_weight = found[1:]
            yield block.index, found[0]

    def dense_gradients(self) -> dict[str, Tensor]:
        """Gradients of hidden states and head, whole; nothing for logits."""
        if self.problem.logits is not None:
            return {}
        dtype = accumulation_dtype(self.dtype)
        found = {k: torch.zeros_like(v, dtype=dtype) for k, v in self.problem.inputs.items()}
        found = {name: value.flatten(0, -2).detach() for name, value in found.items()}
        for index, rows in self.row_gradients():
            found["hidden"][index] = rows.to(dtype)
            for part in self._of_weight:
                found["weight"] += part
        # stored as autograd would store it
        return {name: value.to(self.dtype) for name, value in found.items()}


def _rows_a_block(problem: Problem) -> int:
    return max(1, _BLOCK // problem.shape.vocab)


def _scoring_rows(problem: Problem) -> _Rows:
    labels, cu_seqlens = problem.labels, problem.cu_seqlens
    if cu_seqlens is None:
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
        sequence = torch.arange(len(labels), device=labels.device)
        sequence = sequence.repeat_interleave(labels.shape[1])
    else:
        following = torch.nn.functional.pad(labels[1:], (0, 1), value=IGNORE)
        # the last token of a sequence scores nothing of the next one
        following[cu_seqlens[1:] - 1] = IGNORE
        lengths = cu_seqlens.diff()
        sequence = torch.arange(len(lengths), device=labels.device).repeat_interleave(lengths)
    index = (following != IGNORE).nonzero().squeeze(-1)
    return _Rows(index, following[index], sequence[index])
