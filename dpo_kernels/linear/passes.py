"""What the ops from hidden states compute: passes over tiles of logits that fit a workspace.

Gradients that are made before grad_output is known are those for a grad_output of 1.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..backends.batch import PairLoss
from ..compat import autograd_inside_op
from ..ops import token_results
from ..pairs import is_made_by_kernels, pair_output, reduce_losses
from ..sequences import SequenceLayout
from ..types import LossOptions, Tokens, accumulation_dtype
from .plan import Plan
from .workspace import Head, HeadGradients, HeadOptions, Needs, Workspace


def _rows(hidden: Tensor) -> Tensor:
    return hidden.detach().reshape(-1, hidden.shape[-1])


def token_outputs(
    hidden: Tensor, labels: Tensor, stats: bool, plan: Plan | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [3, N], stats [3, N], is_top1 [N]) as ops.py's, 0 where nothing is scored."""
    count, dtype = labels.numel(), accumulation_dtype(hidden.dtype)
    blank = hidden.new_zeros if plan is None else functools.partial(plan.blank, hidden)
    return (
        blank((3, count), dtype=dtype),
        blank((3, count if stats else 0), dtype=dtype),
        blank((count if stats else 0,), dtype=torch.bool),
    )


def _store(outputs: tuple[Tensor, Tensor, Tensor], tokens: Tensor, out: Tokens) -> None:
    logps, stats, is_top1 = outputs
    logps.index_copy_(1, tokens, out.tokens)
    if stats.numel():
        stats.index_copy_(1, tokens, out.stats)
        is_top1.index_copy_(0, tokens, out.is_top1)


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
    gradients.space.release()
    totals = (gradients.hidden_total(), gradients.weight_total(), gradients.bias_total())
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
    space, rows = Workspace(Head.of(weight, bias, options), layout, options, False), _rows(hidden)
    plan = space.plan
    outputs = token_outputs(hidden, layout.labels, stats, plan)
    gradients = HeadGradients(space, rows, Needs(unit_gradient, False, False), hidden.dtype)
    for part in space.split(slice(0, space.count)):
        tile = space.fill(rows, part)
        out = space.forward(tile, stats)
        _store(outputs, plan.tokens[part], out)
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
    head, rows = Head.of(weight, bias, options), _rows(hidden)
    space = Workspace(head, layout, options, needs.weight)
    gradients = HeadGradients(space, rows, needs, hidden.dtype)
    for part in space.split(slice(0, space.count)):
        tile, index = space.fill(rows, part), space.plan.tokens[part]
        gradients.add(tile, tokens[:, index], grad[index].to(tokens.dtype))
    return _gradient_results(gradients, hidden, weight, bias, False)


class _Pairs:
    """A call of linear_dpo, and what is known so far of the log-probs of its tokens."""

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        layout: SequenceLayout,
        options: HeadOptions,
        loss_options: LossOptions,
        needs: Needs,
        stats: bool,
    ):
        self.layout = layout
        self.options = loss_options
        self.needs = needs
        self.space = Workspace(head, layout, options, needs.weight, whole_pairs=True)
        self.rows = _rows(hidden)
        held = held_dtype(hidden.dtype, True)
        self.gradients = HeadGradients(self.space, self.rows, needs, held, self._size_of_gradient())
        sizes = [group.rows.stop - group.rows.start for group in self.space.plan.groups]
        # of whole pairs, each in one tile
        self.by_kernels = (
            is_made_by_kernels(loss_options)
            and 0 < max(sizes, default=0) <= self.space.plan.tile_rows
            and self.space.vocab_group is None
        )
        # WPO needs log sum p^2
        self.stats = stats or loss_options.use_weighting
        labels = layout.labels if stats or not self.by_kernels else layout.labels[:0]
        self.outputs = token_outputs(hidden, labels, self.stats, self.space.plan)

    def _size_of_gradient(self) -> float:
        """A power of two near the most that a token's log-prob has, where the loss bounds it."""
        options, num_seqs = self.options, max(self.layout.num_seqs, 2)
        if not is_made_by_kernels(options):
            return 1.0
        size = options.beta
        if options.reduction == "mean":
            size /= num_seqs // 2
        if options.average_log_prob:
            # of an answer of one token it is as far above this as of a mean answer below
            size /= math.sqrt(max(self.space.count / num_seqs, 1))
        return 2.0 ** round(math.log2(size))

    def loss_by_kernels(
        self, reference: tuple[Tensor, Head] | None, reference_logps: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, losses [P], seqs [3, 2P] as ops.py's), in the launches that read the logits."""
        space, options, made = self.space, self.options, []
        pairs, average = self.layout.num_seqs // 2, options.average_log_prob
        weight = 1 / pairs if options.reduction == "mean" else 1.0
        for members, part, cu_seqlens in space.plan.groups:
            logps = None
            if reference is not None:
                # in a tile of the same shape: equal models get equal bits
                tile = space.fill(reference[0], part, cu_seqlens, reference[1])
                logps = space.forward_sequences(tile, None, False, average)[1][0]
            elif reference_logps is not None:
                logps = reference_logps.view(2, pairs)[:, members].contiguous().view(-1)
            tile = space.fill(self.rows, part, cu_seqlens)
            pair = PairLoss(logps, options.beta, options.label_smoothing, weight)
            out, seqs = space.forward_sequences(tile, pair, self.stats, average)
            if self.stats:
                _store(self.outputs, space.plan.tokens[part], token_results(tile.batch, out))
            if any(self.needs):
                self.gradients.add(tile, out.tokens, seqs[1], "sequence")
            made.append((out.loss, out.losses, seqs))
        loss, losses, seqs = made[0]
        if len(made) > 1:
            losses = torch.cat([each for _, each, _ in made])
            seqs = torch.cat([each.view(3, 2, -1) for *_, each in made], -1).view(3, -1)
            loss = reduce_losses(losses, options.reduction)
        fault = space.plan.fault
        return (loss, losses, seqs) if fault is None else (loss, losses + fault, seqs + fault)

    def loss_by_torch(
        self, reference: tuple[Tensor, Head] | None, reference_logps: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of any loss, and of pairs larger than a tile."""
        space, layout, outputs = self.space, self.layout, self.outputs
        plan = space.plan
        # the loss of a pair is known when all of its logits are. Those of a trainable head stay
        # until then, or are computed again for a pair larger than a tile; a frozen head's have
        # become the gradient of hidden by then, which is scaled
        frozen = not (self.needs.weight or self.needs.bias)
        groups = [slice(0, space.count)] if frozen else [group.rows for group in plan.groups]
        reference_tokens = None if reference is None else torch.zeros_like(outputs[0][0])
        loss = None
        for group in groups:
            parts, tile = space.split(group), None
            is_scaled = frozen and len(parts) > 1
            if reference is not None and reference_tokens is not None:
                # before the policy and in tiles of the same shape: equal models get equal bits
                for part in parts:
                    tile = space.fill(reference[0], part, None, reference[1])
                    logps = space.forward(tile, False).tokens[0]
                    reference_tokens.index_copy_(0, plan.tokens[part], logps)
                reference_logps = self._sums(reference_tokens)[0]
            for part in parts:
                tile = space.fill(self.rows, part)
                out = space.forward(tile, self.stats)
                _store(outputs, plan.tokens[part], out)
                if is_scaled and self.needs.hidden:
                    self.gradients.add(tile, out.tokens, None)
            loss = self._composed(reference_logps)
            if not any(self.needs):
                continue
            gradient = self._by_token(loss[2][1])
            if is_scaled:
                self.gradients.scale(layout.of_rows(gradient.masked_fill(~layout.scored, 0)))
                continue
            for part in parts:
                tile = space.fill(self.rows, part) if len(parts) > 1 or tile is None else tile
                index = plan.tokens[part]
                self.gradients.add(tile, outputs[0][:, index], gradient[index])
        return loss or self._composed(reference_logps)

    def _sums(self, logps: Tensor, aligned: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        average, ld_alpha = self.options.average_log_prob, self.options.ld_alpha
        return self.layout.logps_and_weights(logps, aligned, average, ld_alpha)

    def _composed(self, reference_logps: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, losses, seqs), right for the pairs whose log-probs are known.

        A pair's gradient depends on the other pairs only through their numbers of tokens.
        """
        layout, options, (tokens, stats, _) = self.layout, self.options, self.outputs
        with autograd_inside_op():
            aligned = tokens[0] - stats[2] if options.use_weighting else None
            logps, weights = self._sums(tokens[0], aligned)
            logps.requires_grad_(any(self.needs))
            output = pair_output(logps, reference_logps, layout.lengths, options, weights)
            scale = torch.zeros_like(logps)
            if any(self.needs):
                (scale,) = torch.autograd.grad(output.loss, logps)
        if options.average_log_prob:
            scale = scale / layout.lengths.clamp(min=1)
        rewards = torch.cat((output.chosen_rewards, output.rejected_rewards))
        seqs = torch.stack((logps.detach(), scale, rewards))
        return output.loss.detach(), output.losses.contiguous(), seqs

    def _by_token(self, scale: Tensor) -> Tensor:
        gradient, ld_alpha = self.layout.spread(scale), self.options.ld_alpha
        if ld_alpha is None:
            return gradient
        return gradient * self.layout.token_weights(ld_alpha, gradient.dtype)


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
    """A loss that couples no pairs, and its gradients in the same pass.

    Returns (loss, losses [P], seqs [3, 2P] as ops.py's, logps [N], stats, is_top1, dhidden,
    dweight, dbias).
    """
    head, reference = Head.of(weight, bias, options), None
    if reference_hidden is not None:
        reference = (_rows(reference_hidden), head)
        if reference_weight is not None:
            reference = (reference[0], Head.of(reference_weight, reference_bias, options))
    pairs = _Pairs(head, hidden, layout, options, loss_options, needs, stats)
    make = pairs.loss_by_kernels if pairs.by_kernels else pairs.loss_by_torch
    loss, losses, seqs = make(reference, reference_logps)
    tokens, values, is_top1 = pairs.outputs
    if not stats:
        tokens, values, is_top1 = token_outputs(hidden, layout.labels[:0], False)
    return (
        loss,
        losses,
        seqs,
        tokens[0].clone(),
        values,
        is_top1,
        *_gradient_results(pairs.gradients, hidden, weight, bias, True),
    )
