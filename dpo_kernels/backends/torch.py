"""The fallback: reference.py behind the kernels' interface, on any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..compat import autograd_inside_op
from ..losses import LossOptions
from .batch import ForwardOutputs, PairLoss, TokenBatch, Upstream

CHECKS_LABELS = False
# backward may be given a gradient of another dtype than the logits
CASTS_GRADIENT = True


def unavailable() -> str | None:
    return None


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def empty_gradient(batch: TokenBatch) -> tuple[Tensor, bool]:
    return batch.logits.new_empty(batch.logits.shape), False


def _scoring(batch: TokenBatch) -> dict:
    return {**_rows(batch), **_transform(batch)}


def _rows(batch: TokenBatch) -> dict:
    return {
        "ignore_index": batch.ignore_index,
        "shift": batch.shift,
        "cu_seqlens": batch.cu_seqlens,
    }


def _transform(batch: TokenBatch) -> dict:
    return {"scale": batch.scale, "softcap": batch.softcap, "temperature": batch.temperature}


def forward(batch: TokenBatch, pair: PairLoss | None, out: ForwardOutputs) -> int:
    stats = reference.token_stats(batch.logits, batch.labels, **_scoring(batch))
    z = reference.transform_logits(batch.logits, **_transform(batch))
    row_max = z.amax(-1)
    log_sum = (z - row_max.unsqueeze(-1)).logsumexp(-1)
    scored = _scored(batch)
    shifted = (row_max.roll(int(batch.shift), -1), log_sum.roll(int(batch.shift), -1))
    rows = [stats.logps, *(value.where(scored, 0.0) for value in shifted)]
    for target, value in zip(out.tokens, rows, strict=True):
        target.copy_(value.flatten())
    if out.stats is not None:
        kept = (stats.entropy, stats.mean_logits, stats.log_sum_sq_probs)
        for target, value in zip(out.stats, kept, strict=True):
            target.copy_(value.flatten())
        out.is_top1.copy_(stats.is_top1.flatten())
    if out.seqs is not None:
        _sequences(batch, pair, out, stats.logps)
    return -1


def _scored(batch: TokenBatch) -> Tensor:
    return reference.scored_labels(batch.labels, **_rows(batch)) != batch.ignore_index


def _sequences(
    batch: TokenBatch, pair: PairLoss | None, out: ForwardOutputs, logps: Tensor
) -> None:
    out.counts.copy_(reference.sequence_lengths(batch.labels, **_rows(batch)))
    per_token = 1.0 / out.counts.clamp(min=1).to(out.seqs.dtype) if out.average else 1.0
    out.seqs[0] = reference.sums_per_sequence(logps, batch.cu_seqlens) * per_token
    out.seqs[1] = per_token
    if pair is None:
        return
    options = LossOptions(
        beta=pair.beta,
        label_smoothing=pair.label_smoothing,
        reference_free=pair.reference_logps is None,
    )
    given = pair.reference_logps is not None
    ref = pair.reference_logps.chunk(2) if given else (None, None)
    with autograd_inside_op():
        policy = out.seqs[0].clone().requires_grad_()
        losses, *rewards = reference.preference_loss_from(
            policy.chunk(2), ref, (None, None), options
        )
        loss = losses.sum() * pair.weight
        (slope,) = torch.autograd.grad(loss, policy)
    out.seqs[1] *= slope
    out.seqs[2] = torch.cat(rewards)
    out.losses.copy_(losses.detach())
    out.loss.copy_(loss.detach())


def backward(
    batch: TokenBatch, tokens: Tensor, upstream: Upstream, grad_logits: Tensor, zero_unscored: bool
) -> int:
    with autograd_inside_op():
        logits = batch.logits.detach().requires_grad_()
        logps = reference.token_logps(logits, batch.labels, **_scoring(batch))
        (gradient,) = torch.autograd.grad(logps, logits, _coefficients(batch, upstream))
    # zero times a NaN or infinite logit of a row that is not scored is not zero
    scored = _scored(batch)
    if batch.shift:
        scored = torch.nn.functional.pad(scored[..., 1:], (0, 1))
    grad_logits.copy_(gradient.masked_fill_(~scored.unsqueeze(-1), 0.0))
    return -1


def _coefficients(batch: TokenBatch, upstream: Upstream) -> Tensor:
    num_seqs = batch.num_seqs
    grad = upstream.grad if upstream.stride else upstream.grad.flatten()[:1]
    if upstream.index == "token":
        return grad.expand(batch.num_tokens).view(batch.labels.shape)
    if upstream.index == "pair" and upstream.stride:
        grad = grad.repeat(2)
    per_sequence = grad.expand(num_seqs)
    if upstream.scale is not None:
        per_sequence = per_sequence * upstream.scale
    if batch.cu_seqlens is None:
        return per_sequence.unsqueeze(-1).expand(batch.labels.shape)
    position = torch.arange(batch.num_tokens, device=batch.logits.device)
    sequence = torch.searchsorted(batch.cu_seqlens[1:], position, right=True)
    return per_sequence[sequence.clamp(max=num_seqs - 1)]
