"""What the ops from hidden states compute: passes over tiles of logits that fit a workspace.

Gradients that are made before the upstream gradient is known are those for an upstream of 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .backends.batch import ForwardOutputs
from .compat import autograd_inside_op
from .layout import SequenceLayout
from .losses import LossOptions, make_options
from .tiles import (
    Head,
    HeadGradients,
    LinearOptions,
    Tile,
    Workspace,
    check_labels_in_vocab,
    scored_tokens,
)
from .types import accumulation_dtype


class Needs(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool


class PairArguments(NamedTuple):
    """The loss of linear_dpo, in the order of its schema."""

    average: bool
    ld_alpha: float | None
    use_weighting: bool
    reduction: str
    beta: float
    loss_types: tuple[str, ...]
    loss_weights: tuple[float, ...] | None
    label_smoothing: float
    reference_free: bool
    f_divergence: str
    f_alpha: float
    discopop_tau: float
    simpo_gamma: float

    @staticmethod
    def of(
        options: LossOptions,
        average: bool,
        ld_alpha: float | None,
        use_weighting: bool,
        reduction: str,
    ) -> PairArguments:
        weights = options.loss_weights
        return PairArguments(
            average,
            ld_alpha,
            use_weighting,
            reduction,
            float(options.beta),
            tuple(name for name, _ in options.mix),
            None if weights is None else tuple(float(weight) for weight in weights),
            float(options.label_smoothing),
            options.reference_free,
            options.f_divergence,
            float(options.f_alpha_divergence_coef),
            float(options.discopop_tau),
            float(options.simpo_gamma),
        )

    def loss_options(self) -> LossOptions:
        return make_options(
            beta=self.beta,
            loss_type=self.loss_types,
            loss_weights=self.loss_weights,
            label_smoothing=self.label_smoothing,
            reference_free=self.reference_free,
            f_divergence=self.f_divergence,
            f_alpha_divergence_coef=self.f_alpha,
            discopop_tau=self.discopop_tau,
            simpo_gamma=self.simpo_gamma,
        )


def _rows(hidden: Tensor) -> Tensor:
    return hidden.detach().reshape(-1, hidden.shape[-1])


def _layout(labels: Tensor, cu_seqlens: Tensor | None, options: LinearOptions) -> SequenceLayout:
    return SequenceLayout(labels, cu_seqlens, options.rows.ignore_index, options.rows.shift)


def token_outputs(hidden: Tensor, labels: Tensor, stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [3, N], stats [3, N], is_top1 [N]) as ops.py's, 0 where nothing is scored."""
    count, dtype = labels.numel(), accumulation_dtype(hidden.dtype)
    return (
        hidden.new_zeros((3, count), dtype=dtype),
        hidden.new_zeros((3, count if stats else 0), dtype=dtype),
        hidden.new_zeros((count if stats else 0,), dtype=torch.bool),
    )


def _store(outputs: tuple[Tensor, Tensor, Tensor], tile: Tile, out: ForwardOutputs) -> None:
    tokens, stats, is_top1 = outputs
    tokens.index_copy_(1, tile.tokens, out.tokens)
    if stats.shape[1]:
        stats.index_copy_(1, tile.tokens, out.stats)
        is_top1.index_copy_(0, tile.tokens, out.is_top1)


def held_dtype(dtype: torch.dtype, made_in_forward: bool) -> torch.dtype:
    """What a gradient is kept in until it is returned."""
    # a loss scale that keeps float16 from underflowing comes only with the upstream gradient
    return torch.float32 if dtype == torch.float16 and made_in_forward else dtype


def gradient_outputs(hidden, weight, bias, needs: Needs, made_in_forward: bool):
    return tuple(
        like.new_empty(like.shape, dtype=held_dtype(like.dtype, made_in_forward))
        if need
        else hidden.new_empty((0,))
        for like, need in zip((hidden, weight, bias), needs, strict=True)
    )


def _gradient_results(gradients: HeadGradients, hidden, weight, bias, made_in_forward: bool):
    totals = (gradients.hidden, gradients.weight_total(), gradients.bias)
    return tuple(
        hidden.new_empty((0,))
        if total is None
        else total.view(like.shape).to(held_dtype(like.dtype, made_in_forward))
        for like, total in zip((hidden, weight, bias), totals, strict=True)
    )


def linear_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    options: LinearOptions,
    stats: bool,
    unit_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens, stats, is_top1, u), ``u_r = d logp_r / d hidden_r = (onehot - p_r) W``."""
    layout = _layout(labels, cu_seqlens, options)
    check_labels_in_vocab(layout, weight.shape[0])
    outputs = token_outputs(hidden, labels, stats)
    scored, _ = scored_tokens(layout)
    space = Workspace(Head.of(weight, bias, options), layout, options, scored.shape[0])
    rows = _rows(hidden)
    gradients = HeadGradients(space, rows, Needs(unit_gradient, False, False), hidden.dtype)
    for part in space.split(scored.shape[0]):
        tile = space.fill(rows, scored[part])
        out = space.forward(tile, stats)
        _store(outputs, tile, out)
        if unit_gradient:
            gradients.add(tile, out.tokens, None)
    unit = gradients.hidden.view(hidden.shape) if unit_gradient else hidden.new_empty((0,))
    return *outputs, unit


def linear_tokens_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    options: LinearOptions,
    tokens: Tensor,
    grad: Tensor,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for the slopes ``grad`` [N] of the log-probs, from logits computed once more."""
    layout = _layout(labels, cu_seqlens, options)
    scored, _ = scored_tokens(layout)
    space = Workspace(Head.of(weight, bias, options), layout, options, scored.shape[0])
    rows = _rows(hidden)
    gradients = HeadGradients(space, rows, needs, hidden.dtype)
    for part in space.split(scored.shape[0]):
        tile = space.fill(rows, scored[part])
        gradients.add(tile, tokens[:, tile.tokens], grad[tile.tokens].to(tokens.dtype))
    return _gradient_results(gradients, hidden, weight, bias, False)


class _Batch:
    """What is known so far of the log-probs of a batch, and the slopes of the loss by them."""

    def __init__(self, layout: SequenceLayout, pair: PairArguments, hidden: Tensor, stats: bool):
        self.layout = layout
        self.pair = pair
        self.options = pair.loss_options()
        # WPO needs log sum p^2
        self.outputs = token_outputs(hidden, layout.labels, stats or pair.use_weighting)
        self.reference_tokens = torch.zeros_like(self.outputs[0][0])
        weights = None if pair.ld_alpha is None else layout.token_weights(pair.ld_alpha)
        self.token_weights = weights

    @property
    def stats(self) -> bool:
        return self.outputs[1].shape[1] > 0

    def logps(self) -> Tensor:
        return self._sums(self.outputs[0][0])

    def reference_logps(self) -> Tensor:
        return self._sums(self.reference_tokens)

    def _sums(self, token_logps: Tensor) -> Tensor:
        return self.layout.sequence_logps(token_logps, self.pair.average, self.pair.ld_alpha)

    def pair_weights(self) -> Tensor | None:
        if not self.pair.use_weighting:
            return None
        tokens, stats, _ = self.outputs
        return self.layout.wpo_weights(tokens[0] - stats[2])

    def slopes(self, reference_logps: Tensor | None) -> Tensor:
        """d loss / d logp of every token, [N]; right for the pairs whose log-probs are known.

        The slopes of a pair depend on the other pairs only through their numbers of tokens.
        """
        with autograd_inside_op():
            logps = self.logps().requires_grad_()
            output = reference.pair_output(
                logps.chunk(2),
                (None, None) if reference_logps is None else reference_logps.chunk(2),
                None if self.pair.average else self.layout.lengths.chunk(2),
                self.options,
                self.pair.reduction,
                self.pair_weights(),
            )
            (slopes,) = torch.autograd.grad(output.loss, logps)
        if self.pair.average:
            slopes = slopes / self.layout.lengths.clamp(min=1)
        slopes = self.layout.spread(slopes)
        return slopes if self.token_weights is None else slopes * self.token_weights


def _groups(lengths: list[int] | None, count: int, max_rows: int) -> list[list[slice]]:
    """Groups of whole pairs of at most max_rows scored tokens, a larger pair in one of its own.

    A group is given as slices of the scored tokens, its chosen and its rejected answers'.
    """
    if lengths is None:
        return [[slice(0, count)]] if count else []
    pairs = len(lengths) // 2
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    groups, first, rows = [], 0, 0
    for pair in range(pairs):
        size = lengths[pair] + lengths[pairs + pair]
        if rows and rows + size > max_rows:
            groups.append((first, pair))
            first, rows = pair, 0
        rows += size
    if rows:
        groups.append((first, pairs))
    return [
        [slice(starts[a], starts[b]), slice(starts[pairs + a], starts[pairs + b])]
        for a, b in groups
    ]


def linear_dpo(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    options: LinearOptions,
    reference_logps: Tensor | None,
    reference_hidden: Tensor | None,
    reference_weight: Tensor | None,
    reference_bias: Tensor | None,
    stats: bool,
    pair: PairArguments,
    needs: Needs,
) -> tuple[Tensor, ...]:
    """The log-probs and, for a loss that couples no pairs, its gradients in the same visit.

    Returns (logps [2P], reference logps [2P], WPO's weights [P], tokens, stats, is_top1, dhidden,
    dweight, dbias).
    """
    layout = _layout(labels, cu_seqlens, options)
    check_labels_in_vocab(layout, weight.shape[0])
    head = reference_head = Head.of(weight, bias, options)
    if reference_weight is not None:
        reference_head = Head.of(reference_weight, reference_bias, options)
    reference_rows = None if reference_hidden is None else _rows(reference_hidden)
    scored, lengths = scored_tokens(layout)
    space, rows = Workspace(head, layout, options, scored.shape[0]), _rows(hidden)
    batch = _Batch(layout, pair, hidden, stats)
    gradients = HeadGradients(space, rows, needs, held_dtype(hidden.dtype, True))
    for group in _groups(lengths, scored.shape[0], space.max_rows):
        members = torch.cat([scored[part] for part in group])
        parts = space.split(members.shape[0])
        if reference_rows is not None:
            # before the policy and in tiles of the same shape: equal models get equal bits
            for part in parts:
                tile = space.fill(reference_rows, members[part], reference_head)
                tokens = space.forward(tile, False).tokens
                batch.reference_tokens.index_copy_(0, tile.tokens, tokens[0])
            reference_logps = batch.reference_logps()
        for part in parts:
            tile = space.fill(rows, members[part])
            _store(batch.outputs, tile, space.forward(tile, batch.stats))
        slopes = batch.slopes(reference_logps)
        for part in parts:
            # a single tile still holds its logits; those of a larger pair are computed again
            tile = tile if len(parts) == 1 else space.fill(rows, members[part])
            tokens = batch.outputs[0][:, tile.tokens]
            gradients.add(tile, tokens, slopes[tile.tokens])
    none = hidden.new_empty((0,), dtype=batch.reference_tokens.dtype)
    weights = batch.pair_weights()
    tokens, values, is_top1 = batch.outputs
    return (
        batch.logps(),
        none if reference_rows is None else batch.reference_logps(),
        none.clone() if weights is None else weights,
        tokens,
        values if stats else values.new_empty((3, 0)),
        is_top1 if stats else is_top1.new_empty((0,)),
        *_gradient_results(gradients, hidden, weight, bias, True),
    )
