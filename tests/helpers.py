"""Problems to solve, and the rule by which a solution counts as right.

Truth is the reference on the same inputs in float64. A result in some dtype may err as much as the
reference in that dtype errs, plus a tolerance that counts roundings in units of the dtype's eps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dpo_kernels import TokenStats, reference
from dpo_kernels.dispatch import backend_module

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "sliced vocabulary", "strided rows")
IGNORE = -100


class Target(NamedTuple):
    backend: str
    device: str
    # "ptx": the GPU's code, executed by tests/ptx
    executor: str = ""


CPU = Target("cpu", "cpu")


@dataclass
class Problem:
    """A batch of pairs; ``logits`` is a leaf with a gradient, in whatever layout was asked for."""

    logits: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    reference: tuple[Tensor, Tensor]

    @property
    def vocab(self) -> int:
        return self.logits.shape[-1]

    @property
    def layout(self) -> dict:
        return {"cu_seqlens": self.cu_seqlens}

    def with_logits(self, logits: Tensor) -> Problem:
        return replace(self, logits=logits.detach().requires_grad_())

    def double(self) -> Problem:
        wide = self.with_logits(self.logits.detach().double())
        wide.reference = tuple(x.double() for x in self.reference)
        return wide


def laid_out(values: Tensor, layout: str) -> Tensor:
    """``values`` again, as a view of a larger tensor that holds NaN everywhere else."""
    if layout == "contiguous":
        return values.contiguous()
    *lead, rows, vocab = values.shape
    if layout == "sliced vocabulary":
        # 5 extra columns: rows that start at no multiple of 16 bytes
        view = values.new_full((*lead, rows, vocab + 5), math.nan)[..., :vocab]
    else:
        view = values.new_full((*lead, 2 * rows, vocab), math.nan)[..., ::2, :]
    return view.copy_(values)


def make_problem(
    target: Target = CPU,
    dtype: torch.dtype = torch.float32,
    *,
    pairs: int = 2,
    length: int = 4,
    vocab: int = 67,
    packed: bool = False,
    layout: str = "contiguous",
    scored: float = 0.7,
    seed: int = 0,
) -> Problem:
    """Random logits of standard deviation 3; packed sequences have lengths 1 to ``length``."""
    rng = torch.Generator().manual_seed(seed)
    num_seqs, cu_seqlens, shape = 2 * pairs, None, (2 * pairs, length)
    if packed:
        lengths = torch.randint(1, length + 1, (num_seqs,), generator=rng)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(target.device)
        shape = (int(lengths.sum()),)
    logits = (3 * torch.randn(*shape, vocab, generator=rng, dtype=torch.float64)).to(dtype)
    labels = torch.randint(vocab, shape, generator=rng)
    masked = torch.rand(shape, generator=rng) > scored
    refs = 3 * torch.randn(2, pairs, generator=rng) - 8
    refs = refs.to(target.device, torch.promote_types(dtype, torch.float32))
    return Problem(
        laid_out(logits.to(target.device), layout).requires_grad_(),
        labels.masked_fill(masked, IGNORE).to(target.device),
        cu_seqlens,
        (refs[0], refs[1]),
    )


def skip_if_refused(target: Target, dtype: torch.dtype) -> None:
    """float64 may be refused by a GPU's backend; nothing else may."""
    reason = backend_module(target.backend).refuses(torch.device(target.device), dtype)
    if reason is not None and dtype == torch.float64:
        pytest.skip(f"{target.backend}: {reason}")
    assert reason is None


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def acc_eps(dtype: torch.dtype) -> float:
    """eps of the results: arithmetic is float32, or float64 for float64 logits."""
    return eps(torch.promote_types(dtype, torch.float32))


def logp_tolerance(truth: Tensor, dtype: torch.dtype, vocab: int, z_max: float = 0.0) -> Tensor:
    """How far the log-prob of a token may be off.

    In units of eps: 4 |logp| for the rounding of z - max and of logp itself, 8 for exp and log (2
    ulp each, twice), 2 log2 V for a sum over V terms in blocks. ``z_max`` counts when a temperature
    divides the logits, which rounds every z to eps |z|.
    """
    return acc_eps(dtype) * (4 * truth.abs() + 8 + 2 * math.log2(vocab) + 4 * z_max)


def gradient_tolerance(
    truth: Tensor, target: Target, dtype: torch.dtype, vocab: int, c_error: float = 0.0
) -> Tensor:
    """How far an element of dlogits may be off: c (onehot - p), stored in ``dtype``.

    Storing rounds to eps / 2 of the dtype, or to half a subnormal where the dtype underflows. p =
    exp((z - max) - log_sum) errs by eps times its exponent (40 covers these problems) and by the
    error of log_sum; 1 - p of a target with p < 0.8 by 4 times that. ``c_error`` is relative.
    """
    info = torch.finfo(dtype)
    # Triton's interpreter cuts float32 down to bfloat16; GPUs round
    truncates = target == Target("triton", "cpu") and dtype == torch.bfloat16
    stored = info.eps if truncates else 0.51 * info.eps
    relative = stored + acc_eps(dtype) * (40 + 4 * (8 + 2 * math.log2(vocab))) + c_error
    return truth.abs() * relative + info.smallest_normal * info.eps


def assert_rule(name: str, ours: Tensor, theirs: Tensor, truth: Tensor, tolerance) -> None:
    """``|ours - truth| <= |theirs - truth| + tolerance``, NaN and infinities in the same places."""
    assert ours.shape == truth.shape, f"{name}: {list(ours.shape)}, expected {list(truth.shape)}"
    ours, theirs = ours.detach().double(), theirs.detach().double()
    same = (ours == truth) | (ours.isnan() & truth.isnan())
    excess = (ours - truth).abs() - (theirs - truth).abs().nan_to_num(0.0) - tolerance
    bad = ~same & ~(excess <= 0)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(at)}: got {ours[at]:.10g}, truth {truth[at]:.10g}, reference "
            f"{theirs[at]:.10g}; {int(bad.sum())} of {bad.numel()} elements break the rule"
        )


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and torch.equal(a, b)


def scored_rows(problem: Problem, shift: bool) -> Tensor:
    """Which rows of logits score a label."""
    labels = reference.scored_labels(problem.labels, shift=shift, cu_seqlens=problem.cu_seqlens)
    scored = labels != IGNORE
    return torch.nn.functional.pad(scored[..., 1:], (0, 1)) if shift else scored


def stats_tolerances(truth: TokenStats, dtype: torch.dtype, vocab: int, mean_abs_z) -> dict:
    """In units of eps, with 8 + 2 log2 V for the sums as in logp_tolerance.

    The entropy is log_sum - E[z - max]: both are at most entropy + log V. The mean logit sums terms
    of size mean |z|.
    """
    roundings = acc_eps(dtype) * (8 + 2 * math.log2(vocab))
    return {
        "entropy": roundings * (1 + truth.entropy + math.log(vocab)),
        "mean_logits": roundings * mean_abs_z,
        "log_sum_sq_probs": roundings * (1 + truth.log_sum_sq_probs.abs()),
    }


def mem_available() -> int:
    """Bytes that can be allocated without swapping; 0 where /proc does not say."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0
