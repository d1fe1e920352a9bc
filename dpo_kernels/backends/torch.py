"""PyTorch's own operators, by the kernels' rules of precision: any device, any dtype.

With ``z`` the transformed logits of a row, ``m`` its maximum and ``rest = sum exp(z - m)`` over all
columns but the (first) maximum's::

    log_sum = log1p(rest)    logp = (z[label] - m) - log_sum

so that a common offset costs nothing, and a confident token, whose ``rest`` is tiny, keeps its
digits. The gradient of its label is ``-expm1(logp)``, not ``1 - p``, for the same reason. A shard
of the vocabulary gives ``m``, ``log_sum`` and ``z[label]`` of its own columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sequences import SequenceLayout
from .batch import ForwardOutputs, GradOutput, PairLoss, TokenBatch

CHECKS_LABELS = False
CASTS_GRADIENT = True


def unavailable() -> str | None:
    return None


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def empty_gradient(batch: TokenBatch) -> tuple[Tensor, bool]:
    return batch.logits.new_empty(batch.logits.shape), False


def forward(batch: TokenBatch, pair: PairLoss | None, out: ForwardOutputs) -> int:
    layout = _layout(batch)
    labels, scored, here, invalid = _row_labels(batch, layout)
    z = _transformed(batch)
    top, first = z.max(-1, keepdim=True)
    target = z.gather(-1, labels)
    mean = None if out.stats is None else _mean(batch, z)
    distance = z.sub_(top)
    p = distance.exp_() if mean is None else distance.exp()
    log_sum = _sum_of_the_rest(p, first, top).log1p()
    logp = target - top - log_sum
    if batch.vocab_total:
        logp, log_sum = target.where(here, 0), _of_a_shard(log_sum, top)

    def store(places: Tensor, *values: Tensor) -> None:
        for place, value in zip(places, values, strict=True):
            if place.is_floating_point():
                value = value.masked_fill(invalid, torch.nan)
            place.copy_(_by_token(value.masked_fill(~scored, 0), batch))

    store(out.tokens, logp, top, log_sum)
    if out.stats is not None and out.is_top1 is not None and mean is not None:
        entropy = log_sum - _weighted(p, distance) * torch.exp(-log_sum)
        log_squares = _sum_of_the_rest(p.square_(), first, top).log1p()
        log_sum_sq = log_squares - 2 * log_sum
        if batch.vocab_total:
            entropy, log_sum_sq = _of_a_shard(entropy, top), _of_a_shard(log_sum_sq, top)
        store(out.stats, entropy, mean, log_sum_sq)
        store(out.is_top1[None], (first == labels) & here)
    if out.seqs is not None:
        _sequences(layout, pair, out)
    return -1


def backward(
    batch: TokenBatch,
    tokens: Tensor,
    grad_output: GradOutput,
    grad_logits: Tensor,
    zero_unscored: bool,
) -> int:
    layout = _layout(batch)
    labels, scored, here, invalid = _row_labels(batch, layout)
    coefficient = _by_row(_coefficients(layout, grad_output), batch)
    logp, row_max, log_sum = (_by_row(x, batch) for x in tokens)
    gradient = _transformed(batch).sub(row_max).sub_(log_sum).exp_().mul_(-coefficient)
    own = -torch.expm1(logp) * coefficient
    if batch.vocab_total:
        # a label of another shard leaves the columns of this one as they are
        own = own.where(here | invalid, gradient.gather(-1, labels))
    gradient.scatter_(-1, labels, own)
    gradient.mul_(_derivative(batch))
    # zero times a NaN or infinite logit of a row that is not scored is not zero
    grad_logits.copy_(gradient.masked_fill_(~scored, 0))
    return -1


def _layout(batch: TokenBatch) -> SequenceLayout:
    return SequenceLayout(batch.labels, batch.cu_seqlens, batch.ignore_index, batch.shift)


def _row_labels(batch: TokenBatch, layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(column, scored, scored by that column, scored by a label out of range) of every row.

    [..., 1] each. The columns are fit for an index: one out of bounds would end a GPU's context.
    """
    labels = _by_row(layout.scored_labels, batch)
    scored = labels != batch.ignore_index
    columns = labels - batch.vocab_start
    inside = columns.clamp(0, batch.logits.shape[-1] - 1)
    out_of_range = (labels < 0) | (labels >= batch.labels_below)
    return inside, scored, scored & (inside == columns), scored & out_of_range


def _by_row(values: Tensor, batch: TokenBatch) -> Tensor:
    """[N] by token to [..., 1] by row; with shift, row n scores token n + 1 (the last one none)."""
    rows = values.roll(-1) if batch.shift else values
    return rows.view(*batch.labels.shape, 1)


def _by_token(values: Tensor, batch: TokenBatch) -> Tensor:
    tokens = values.flatten()
    return tokens.roll(1) if batch.shift else tokens


def _transformed(batch: TokenBatch) -> Tensor:
    """``softcap * tanh(scale * x / softcap) / temperature`` in the accumulation dtype, a copy."""
    z = batch.logits.to(batch.acc_dtype, copy=True)
    if batch.scale != 1.0:
        z.mul_(batch.scale)
    if batch.softcap:
        z.div_(batch.softcap).tanh_().mul_(batch.softcap)
    return z if batch.temperature == 1.0 else z.div_(batch.temperature)


def _derivative(batch: TokenBatch) -> Tensor | float:
    """dz / dx."""
    factor = batch.scale / batch.temperature
    if not batch.softcap:
        return factor
    # 1 - tanh^2 without its cancellation
    e = (batch.logits.to(batch.acc_dtype) * (batch.scale / batch.softcap)).abs_().mul_(-2).exp_()
    return e.mul(4 * factor).div_(e.add(1).square_())


def _sum_of_the_rest(p: Tensor, first: Tensor, top: Tensor) -> Tensor:
    """Over all columns but the maximum's, which holds 1 and from then on 0."""
    # a maximum that is infinite or not a number leaves no number
    return p.scatter_(-1, first, 0.0).sum(-1, keepdim=True) + (top - top)


def _mean(batch: TokenBatch, z: Tensor) -> Tensor:
    """Of z, finite where it is, though a sum may not be, nor a z that a factor takes too far."""
    x, factor = (z, 1.0) if batch.softcap else (batch.logits.to(z.dtype), _derivative(batch))
    # a power of two, by which each is made smaller before it is added
    unit = 2.0**-24
    mean = (x * unit).mean(-1, keepdim=True) * factor
    largest = torch.finfo(z.dtype).max
    rounded_up = (mean.abs() > largest * unit) & (mean.abs() < 1.01 * largest * unit)
    return (mean / unit).where(~rounded_up, mean.sign() * largest)


def _weighted(p: Tensor, distance: Tensor) -> Tensor:
    """``sum p (z - m)``, to which the maximum adds nothing; overwrites distance."""
    # 0 * -inf is not 0
    return distance.masked_fill_(p == 0, 0.0).mul_(p).sum(-1, keepdim=True)


def _of_a_shard(sums: Tensor, top: Tensor) -> Tensor:
    # columns that are all -inf add nothing to the other shards
    return sums.masked_fill(top == -torch.inf, 0.0)


def _sequences(layout: SequenceLayout, pair: PairLoss | None, out: ForwardOutputs) -> None:
    assert out.seqs is not None and out.counts is not None
    out.counts.copy_(layout.lengths)
    out.seqs[0] = layout.means(out.tokens[0]) if out.average else layout.sums(out.tokens[0])
    out.seqs[1] = 1.0
    if out.average:
        out.seqs[1] /= out.counts.clamp(min=1)
    if pair is None or out.losses is None or out.loss is None:
        return
    # -(1-e) ls(x) - e ls(-x) and its derivative
    ratios = out.seqs[0] if pair.reference_logps is None else out.seqs[0] - pair.reference_logps
    chosen, rejected = ratios.chunk(2)
    x, smoothing = pair.beta * (chosen - rejected), pair.label_smoothing
    losses = -(1 - smoothing) * F.logsigmoid(x)
    derivative = -(1 - smoothing) * torch.sigmoid(-x)
    # 0 * inf where the rejected answer has no chance is not 0
    if smoothing:
        losses -= smoothing * F.logsigmoid(-x)
        derivative += smoothing * torch.sigmoid(x)
    derivative *= pair.beta * pair.weight
    out.seqs[1] *= torch.cat((derivative, -derivative))
    out.seqs[2] = pair.beta * ratios
    out.losses.copy_(losses)
    out.loss.copy_(losses.sum() * pair.weight)


def _coefficients(layout: SequenceLayout, grad_output: GradOutput) -> Tensor:
    """[N]: what multiplies the gradient of every token's log-prob."""
    grad = grad_output.grad if grad_output.stride else grad_output.grad.flatten()[:1]
    if grad_output.index == "token":
        return grad.expand(layout.labels.numel())
    if grad_output.index == "pair" and grad_output.stride:
        grad = grad.repeat(2)
    per_sequence = grad.expand(layout.num_seqs)
    if grad_output.scale is not None:
        per_sequence = per_sequence * grad_output.scale
    return layout.spread(per_sequence)
