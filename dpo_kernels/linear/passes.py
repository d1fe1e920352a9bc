"""What the ops from hidden states compute: passes over tiles of logits that fit a workspace.

Gradients that are made before grad_output is known are those for a grad_output of 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..compat import autograd_inside_op
from ..pairs import pair_output
from ..sequences import SequenceLayout
from ..types import LossOptions, Tokens, accumulation_dtype
from .workspace import (
    Head,
    HeadGradients,
    HeadOptions,
    Needs,
    Tile,
    Workspace,
    scored_by_sequence,
    scored_tokens,
)


def _rows(hidden: Tensor) -> Tensor:
    return hidden.detach().reshape(-1, hidden.shape[-1])


def token_outputs(hidden: Tensor, labels: Tensor, stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [3, N], stats [3, N], is_top1 [N]) as ops.py's, 0 where nothing is scored."""
    count, dtype = labels.numel(), accumulation_dtype(hidden.dtype)
    return (
        hidden.new_zeros((3, count), dtype=dtype),
        hidden.new_zeros((3, count if stats else 0), dtype=dtype),
        hidden.new_zeros((count if stats else 0,), dtype=torch.bool),
    )


def _store(outputs: tuple[Tensor, Tensor, Tensor], tile: Tile, out: Tokens) -> None:
    tokens, stats, is_top1 = outputs
    tokens.index_copy_(1, tile.tokens, out.tokens)
    if stats.numel():
        stats.index_copy_(1, tile.tokens, out.stats)
        is_top1.index_copy_(0, tile.tokens, out.is_top1)


def held_dtype(dtype: torch.dtype, made_in_forward: bool) -> torch.dtype:
    """What a gradient is kept in until it is returned."""
    # a loss scale that keeps float16 from underflowing comes only with grad_output
    return torch.float32 if dtype == torch.float16 and made_in_forward else dtype


def gradient_outputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs, made_in_forward: bool
) -> tuple[Tensor, ...]:
    return tuple(
        like.new_empty(like.shape, dtype=held_dtype(like.dtype, made_in_forward))
        if need and like is not None
        else hidden.new_empty((0,))
        for like, need in zip((hidden, weight, bias), needs, strict=True)
    )


def _gradient_results(
    gradients: HeadGradients,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    made_in_forward: bool,
) -> tuple[Tensor, ...]:
    totals = (gradients.hidden_total(), gradients.weight_total(), gradients.bias)
    return tuple(
        hidden.new_empty((0,))
        if total is None or like is None
        else total.view(like.shape).to(held_dtype(like.dtype, made_in_forward))
        for like, total in zip((hidden, weight, bias), totals, strict=True)
    )


def linear_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: SequenceLayout,
    options: HeadOptions,
    stats: bool,
    unit_gradient: bool,
) -> tuple[Tensor, ...]:
    """(tokens, stats, is_top1, u), ``u_r = d logp_r / d hidden_r = (onehot - p_r) W``."""
    outputs = token_outputs(hidden, layout.labels, stats)
    scored = scored_tokens(layout)
    space = Workspace(Head.of(weight, bias, options), layout, options, scored.shape[0])
    rows = _rows(hidden)
    gradients = HeadGradients(space, rows, Needs(unit_gradient, False, False), hidden.dtype)
    for part in space.split(scored.shape[0]):
        tile = space.fill(rows, scored[part])
        out = space.forward(tile, stats)
        _store(outputs, tile, out)
        if unit_gradient:
            gradients.add(tile, out.tokens, None)
    unit = gradients.hidden_total()
    return *outputs, hidden.new_empty((0,)) if unit is None else unit.view(hidden.shape)


def linear_tokens_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: SequenceLayout,
    options: HeadOptions,
    tokens: Tensor,
    grad: Tensor,
    needs: Needs,
) -> tuple[Tensor, ...]:
    """Gradients for ``grad`` [N], that of the log-probs, from logits computed once more."""
    scored = scored_tokens(layout)
    space = Workspace(Head.of(weight, bias, options), layout, options, scored.shape[0])
    rows = _rows(hidden)
    gradients = HeadGradients(space, rows, needs, hidden.dtype)
    for part in space.split(scored.shape[0]):
        tile = space.fill(rows, scored[part])
        gradients.add(tile, tokens[:, tile.tokens], grad[tile.tokens].to(tokens.dtype))
    return _gradient_results(gradients, hidden, weight, bias, False)


class _Batch:
    """What is known so far of the log-probs of a batch, and the loss's gradient by them."""

    def __init__(self, layout: SequenceLayout, options: LossOptions, hidden: Tensor, stats: bool):
        self.layout = layout
        self.options = options
        # WPO needs log sum p^2
        self.stats = stats or options.use_weighting
        self.outputs = token_outputs(hidden, layout.labels, self.stats)
        self.reference_tokens = torch.zeros_like(self.outputs[0][0])
        self.token_weights = None
        if options.ld_alpha is not None:
            dtype = self.reference_tokens.dtype
            self.token_weights = layout.token_weights(options.ld_alpha, dtype)

    def logps(self) -> Tensor:
        return self._sums(self.outputs[0][0])

    def reference_logps(self) -> Tensor:
        return self._sums(self.reference_tokens)

    def _sums(self, token_logps: Tensor) -> Tensor:
        options = self.options
        return self.layout.sequence_logps(token_logps, options.average_log_prob, options.ld_alpha)

    def pair_weights(self) -> Tensor | None:
        if not self.options.use_weighting:
            return None
        tokens, stats, _ = self.outputs
        return self.layout.wpo_weights(tokens[0] - stats[2])

    def token_gradient(self, reference_logps: Tensor | None) -> Tensor:
        """d loss / d logp of every token, [N]; right for the pairs whose log-probs are known.

        That of a pair depends on the other pairs only through their numbers of tokens.
        """
        layout = self.layout
        with autograd_inside_op():
            logps = self.logps().requires_grad_()
            output = pair_output(
                logps, reference_logps, layout.lengths, self.options, self.pair_weights()
            )
            (gradient,) = torch.autograd.grad(output.loss, logps)
        if self.options.average_log_prob:
            gradient = gradient / layout.lengths.clamp(min=1)
        gradient = layout.spread(gradient)
        return gradient if self.token_weights is None else gradient * self.token_weights


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
    layout: SequenceLayout,
    options: HeadOptions,
    reference_logps: Tensor | None,
    reference_hidden: Tensor | None,
    reference_weight: Tensor | None,
    reference_bias: Tensor | None,
    stats: bool,
    loss_options: LossOptions,
    needs: Needs,
) -> tuple[Tensor, ...]:
    """The log-probs and, for a loss that couples no pairs, its gradients in the same pass.

    Returns (logps [2P], reference logps [2P], lengths [2P], WPO's weights [P], tokens, stats,
    is_top1, dhidden, dweight, dbias).
    """
    head = reference_head = Head.of(weight, bias, options)
    if reference_weight is not None:
        reference_head = Head.of(reference_weight, reference_bias, options)
    reference_rows = None if reference_hidden is None else _rows(reference_hidden)
    scored, lengths = scored_by_sequence(layout)
    space, rows = Workspace(head, layout, options, scored.shape[0]), _rows(hidden)
    batch = _Batch(layout, loss_options, hidden, stats)
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
        tiles = []
        for part in parts:
            tile = space.fill(rows, members[part])
            _store(batch.outputs, tile, space.forward(tile, batch.stats))
            tiles = [tile]
        gradient = batch.token_gradient(reference_logps)
        for part in parts:
            # a single tile still holds its logits; those of a larger pair are computed again
            tile = tiles[0] if len(parts) == 1 else space.fill(rows, members[part])
            tokens = batch.outputs[0][:, tile.tokens]
            gradients.add(tile, tokens, gradient[tile.tokens])
    none = hidden.new_empty((0,), dtype=batch.reference_tokens.dtype)
    weights = batch.pair_weights()
    tokens, values, is_top1 = batch.outputs
    return (
        batch.logps(),
        none if reference_rows is None else batch.reference_logps(),
        layout.lengths.clone(),
        none.clone() if weights is None else weights,
        tokens,
        values if stats else values.new_empty((3, 0)),
        is_top1 if stats else is_top1.new_empty((0,)),
        *_gradient_results(gradients, hidden, weight, bias, True),
    )
