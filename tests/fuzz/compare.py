"""One call of a public function held to the oracle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import dpo_kernels as dk
from tests.fuzz import oracle
from tests.fuzz.strategies import Batch, filled_in, names_of


def close(name: str, ours: Tensor, truth: Tensor, error: Tensor | float) -> None:
    """``|ours - truth| <= error``; where the truth leaves ours' dtype, ours is infinite."""
    assert ours.shape == truth.shape, f"{name}: {list(ours.shape)}, expected {list(truth.shape)}"
    ours, truth = ours.detach(), truth.detach()
    kept = truth.to(ours.dtype)
    same = (ours == kept) | (ours.isnan() & kept.isnan())
    wide = ours.double()
    # the smallest numbers have few digits, or are flushed to 0
    error = error + 4 * torch.finfo(ours.dtype).smallest_normal
    bad = ~same & ~(((wide - truth).abs() <= error) & truth.isfinite())
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        bound = error[at] if isinstance(error, Tensor) and error.dim() else error
        raise AssertionError(
            f"{name}{list(at)}: got {wide[at]:.9g}, truth {truth[at]:.9g}, may be off by "
            f"{bound:.3g}; {int(bad.sum())} of {bad.numel()} are"
        )


def stored(gradient: Tensor, error: Tensor, dtype: torch.dtype, times: int = 1) -> Tensor:
    """``error`` and what rounding to ``dtype`` adds."""
    return error + times * torch.finfo(dtype).eps * gradient.abs()


class Scored:
    """What the oracle knows of a batch once it has its logits z [rows, V], in float64."""

    def __init__(self, batch: Batch, z: Tensor, z_error: Tensor | float = 0.0):
        scoring = batch.scoring
        self.z, self.eps = z, batch.eps
        self.rows = oracle.rows_of(
            batch.labels.flatten(), batch.bounds, scoring["shift"], scoring["ignore_index"]
        )
        if scoring["temperature"] != 1.0 and not isinstance(z_error, Tensor):
            # what lies far below the maximum has no weight: its rounding does not count
            finite = z.where(z.isfinite() & (z > z.amax(-1, keepdim=True) - 200), 0.0)
            z_error = 2 * self.eps * finite.abs().amax(-1)
        self.z_error = z_error
        self.tokens = oracle.token_logps(z, self.rows)
        self.error = oracle.token_error(z, self.rows, self.eps, z_error)

    def dense(self, values: Tensor, like: Tensor) -> Tensor:
        """Values of scored tokens at their places, 0 elsewhere."""
        full = torch.zeros(like.numel(), dtype=torch.float64)
        return full.index_put((self.rows.tokens,), values).view(like.shape)

    def gradient(self, derivatives: Tensor, derivative_error: Tensor) -> tuple[Tensor, Tensor]:
        return oracle.logits_gradient(
            self.z, self.rows, derivatives, derivative_error, self.eps, self.z_error
        )


def scored(batch: Batch) -> Scored:
    return Scored(batch, oracle.transformed(batch.rows, 1.0, None, batch.scoring["temperature"]))


def check_logits_gradient(
    batch: Batch, truth: Scored, grad: Tensor, derivatives, derivative_error
) -> None:
    gradient, error = (
        x.view(grad.shape) / batch.scoring["temperature"]
        for x in truth.gradient(derivatives, derivative_error)
    )
    assert grad.dtype == batch.x.dtype
    close("dlogits", grad, gradient, stored(gradient, error, grad.dtype))


def check_tokens(batch: Batch, backend: str) -> None:
    """token_logps and token_stats; a packed batch is one sequence to them."""
    batch.bounds = [0, batch.labels.numel()]
    if batch.labels.dim() == 2:
        batch.bounds = [batch.labels.shape[1] * i for i in range(batch.labels.shape[0] + 1)]
    truth = scored(batch)
    stats = dk.token_stats(batch.x, batch.labels, **batch.scoring, backend=backend)
    logps = dk.token_logps(batch.x, batch.labels, **batch.scoring, backend=backend)
    assert torch.equal(stats.logps, logps)
    close("logps", logps, truth.dense(truth.tokens, logps), truth.dense(truth.error, logps))
    rng = torch.Generator().manual_seed(1)
    grad_output = torch.randn(logps.shape, generator=rng, dtype=torch.float64).to(logps.dtype)
    (grad,) = torch.autograd.grad(logps, batch.x, grad_output)
    derivatives = grad_output.double().flatten()[truth.rows.tokens]
    check_logits_gradient(batch, truth, grad, derivatives, torch.zeros_like(derivatives))
    check_stats(batch, truth, stats)


def check_stats(batch: Batch, truth: Scored, stats: dk.TokenStats) -> None:
    z = truth.z[truth.rows.rows]
    logp = z.log_softmax(-1)
    p = logp.exp()
    entropy = -(p * logp.clamp(min=-1e300)).sum(-1)
    square = (2 * logp).logsumexp(-1)
    # sums over the vocabulary in blocks, of terms as large as log V and the entropy itself
    known = truth.error.where(truth.tokens.isfinite(), 0.0)
    unit = known + truth.eps * 32 * (1 + entropy + square.abs())
    place = truth.dense
    close("entropy", stats.entropy, place(entropy, stats.logps), place(unit * 4, stats.logps))
    close(
        "log_sum_sq_probs",
        stats.log_sum_sq_probs,
        place(square, stats.logps),
        place(unit * 4, stats.logps),
    )
    # float64 has no room for the sum of its own largest numbers
    mean, size = ((x * 2.0**-40).mean(-1) * 2.0**40 for x in (z, z.abs()))
    error = place(truth.eps * 32 * size, stats.logps).nan_to_num(0.0, 0.0, 0.0)
    close("mean_logits", stats.mean_logits, place(mean, stats.logps), error)
    if batch.scoring["temperature"] == 1.0:
        top = z.argmax(-1) == truth.rows.labels
        assert torch.equal(stats.is_top1, place(top.double(), stats.logps).bool())


def check_sequences(batch: Batch, backend: str, average: bool) -> None:
    truth = scored(batch)
    options = {"cu_seqlens": batch.cu_seqlens, "backend": backend, **batch.scoring}
    logps = dk.sequence_logps(batch.x, batch.labels, average_log_prob=average, **options)
    sums = oracle.per_sequence(truth.tokens, truth.rows, average)
    error = oracle.per_sequence(truth.error, truth.rows, average) + 8 * truth.eps * sums.abs()
    # of tokens that leave float32 there is no mean
    kept = oracle.per_sequence(truth.tokens.to(logps.dtype).double(), truth.rows, False)
    error = error.where(kept.isfinite(), math.inf)
    close("sequence_logps", logps, sums, error)
    grad_output = torch.linspace(-1, 1, logps.shape[0], dtype=logps.dtype)
    (grad,) = torch.autograd.grad(logps, batch.x, grad_output)
    per_token = grad_output.double()[truth.rows.sequence]
    if average:
        per_token = per_token / truth.rows.lengths[truth.rows.sequence]
    check_logits_gradient(batch, truth, grad, per_token, truth.eps * 4 * per_token.abs())


def token_weights(rows: oracle.Rows, alpha: float | None) -> Tensor:
    if alpha is None:
        return torch.ones(rows.tokens.shape, dtype=torch.float64)
    return oracle.ld_weights(rows, alpha)


def sequence_logps(truth: Scored, pair: dict) -> tuple[Tensor, Tensor]:
    """What a loss is made of, [2P], and how far it may be off."""
    rows, average = truth.rows, pair["average_log_prob"]
    weights = token_weights(rows, pair["ld_alpha"])
    return tuple(
        oracle.per_sequence(x * weights, rows, average) for x in (truth.tokens, truth.error)
    )


class Pairs:
    """The oracle's loss of a batch: values, derivatives by token, and how far each may be off."""

    def __init__(self, truth: Scored, refs: Tensor, ref_error: Tensor, loss: dict, pair: dict):
        rows, eps = truth.rows, truth.eps
        average = pair["average_log_prob"]
        options = filled_in(loss, average)
        weights = token_weights(rows, pair["ld_alpha"])
        self.logps, error = sequence_logps(truth, pair)
        error = error + ref_error
        half = 1 / (2 * options["beta"])
        error = error + 8 * eps * (1 + half + self.logps.abs() + refs.abs())
        self.error = error
        self.beta = options["beta"]
        self.ratios = self.logps - refs
        wpo, wpo_error = self._wpo(truth, pair["use_weighting"])

        def losses(logps):
            return wpo * oracle.pair_losses(logps, refs, rows.lengths, options)

        def derivatives(logps):
            leaf = logps.detach().requires_grad_()
            reduction = "sum" if pair["reduction"] == "none" else pair["reduction"]
            return torch.autograd.grad(oracle.reduced(losses(leaf), reduction), leaf)[0]

        self.losses = losses(self.logps)
        moved = oracle.spread_over_corners(losses, self.logps, error)
        size = 1 + options["beta"] * (self.ratios.abs().sum() + half)
        self.loss_error = (
            2 * moved + self.losses.abs() * wpo_error + 64 * eps * (self.losses.abs() + wpo * size)
        )
        derivative = derivatives(self.logps)
        off = 2 * oracle.spread_over_corners(derivatives, self.logps, error)
        off = off + derivative.abs() * (wpo_error.max().item() if wpo_error.numel() else 0.0)
        # the terms of a derivative round to eps, whatever is left of their sum: sigmoid(x) - 1, or
        # two losses that pull apart
        steepness = oracle.steepness(self.ratios, options)
        terms = options["beta"] * wpo.max().item() * steepness
        off = off + 16 * eps * (derivative.abs() + terms)
        per_token = weights
        if average:
            per_token = weights / rows.lengths[rows.sequence]
        self.derivatives, self.derivative_error = (
            x[rows.sequence] * per_token for x in (derivative, off)
        )

    def _wpo(self, truth: Scored, asked: bool) -> tuple[Tensor, Tensor]:
        """Weights [P] and their relative error."""
        pairs = self.logps.shape[0] // 2
        if not asked:
            return torch.ones(pairs, dtype=torch.float64), torch.zeros(pairs, dtype=torch.float64)
        square = (2 * truth.z[truth.rows.rows].log_softmax(-1)).logsumexp(-1)
        means = oracle.per_sequence(truth.tokens - square, truth.rows, True)
        off = truth.error * 2 + truth.eps * 64 * (1 + truth.tokens.abs() + square.abs())
        errors = oracle.per_sequence(off, truth.rows, True)
        return means.view(2, -1).sum(0).exp(), errors.view(2, -1).sum(0)

    def usable(self, loss: dict) -> bool:
        """Whether float32 holds what the loss is made of."""
        largest = self.ratios.abs().max()
        # their exponent is held below 80
        exponential = loss.get("f_divergence") in ("forward_kl", "alpha_divergence")
        tame = largest < (40 if exponential else 1e4) and self.losses.abs().max() < 1e25
        return bool(tame and self.logps.abs().max() < 1e4)

    def sorted_apart(self, loss: dict) -> bool:
        if not {"aot", "aot_unpaired"} & set(names_of(loss)):
            return True
        values = (
            *self.ratios.chunk(2),
            *self.logps.chunk(2),
            self.ratios.view(2, -1).diff(dim=0)[0],
        )
        gaps = [x.sort().values.diff() for x in values]
        return all((gap > 1e-2).all() for gap in gaps)


def check_output(output: dk.DPOOutput, wanted: Pairs, reduction: str) -> None:
    chosen, rejected = output.chosen_logps, output.rejected_logps
    close("logps", torch.cat((chosen, rejected)), wanted.logps, wanted.error)
    rewards = torch.cat((output.chosen_rewards, output.rejected_rewards))
    error = wanted.beta * (wanted.error + 1e-6 * wanted.ratios.abs())
    close("rewards", rewards, wanted.beta * wanted.ratios, error)
    close("losses", output.losses, wanted.losses, wanted.loss_error)
    if reduction == "none":
        assert torch.equal(output.loss.detach(), output.losses)
        return
    total = wanted.loss_error.sum() + 1e-6 * wanted.losses.abs().sum()
    close("loss", output.loss, oracle.reduced(wanted.losses, reduction), total)
