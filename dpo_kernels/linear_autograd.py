"""torch.autograd.Functions from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .autograd import once_differentiable
from .compat import is_batched
from .head_passes import Needs, PairArguments
from .layout import SequenceLayout
from .linear_ops import linear_dpo_op, linear_tokens_backward_op, linear_tokens_op
from .tiles import LinearOptions


class LinearTokenLogps(torch.autograd.Function):
    """(logps like labels, stats, is_top1); only logps has a gradient.

    With a frozen head the forward makes what the backward scales, d logp_r / d hidden_r, so nothing
    is computed twice. With a trainable one the backward computes the logits again.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        options: LinearOptions,
        stats: bool,
        needs: Needs,
    ):
        ctx.unit = needs.hidden and not (needs.weight or needs.bias)
        ctx.options, ctx.needs = options, needs
        ctx.set_materialize_grads(False)
        tokens, values, is_top1, unit = linear_tokens_op(
            hidden, weight, bias, labels, cu_seqlens, *options.flat(), stats, ctx.unit
        )
        ctx.save_for_backward(
            hidden, weight, bias, labels, cu_seqlens, unit if ctx.unit else tokens
        )
        ctx.mark_non_differentiable(values, is_top1)
        return tokens[0].view(labels.shape).clone(), values, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx, saved: tuple, grad: Tensor | None, *unused):
        nothing = (None,) * 8
        if grad is None or not any(ctx.needs_input_grad):
            return nothing
        *head, labels, cu_seqlens, made = saved
        if ctx.unit:
            return _scaled_rows(made, labels, cu_seqlens, grad, ctx.options), *nothing[1:]
        needs = Needs(*(a and b for a, b in zip(ctx.needs, ctx.needs_input_grad, strict=False)))
        gradients = linear_tokens_backward_op(
            *head, labels, cu_seqlens, *ctx.options.flat(), made, grad.reshape(-1), *needs
        )
        return *_asked_for(gradients, needs), *nothing[3:]


def _asked_for(gradients, needs: Needs):
    return (x if need else None for x, need in zip(gradients, needs, strict=True))


def _scaled_rows(
    unit: Tensor, labels: Tensor, cu_seqlens: Tensor | None, grad: Tensor, options: LinearOptions
) -> Tensor:
    """``unit`` [..., D], each row times the slope of the token that it scores."""
    rows = options.rows
    layout = SequenceLayout(labels, cu_seqlens, rows.ignore_index, rows.shift)
    # a token that is not scored may have any slope, NaN among them
    slopes = grad.reshape(-1).where(layout.scored, 0.0)
    if rows.shift:
        # the last row of a sequence gets the slope of the next one's first token, which is 0
        slopes = slopes.roll(-1)
    slopes = slopes.view(*unit.shape[:-1], 1)
    # a batch of gradients cannot be written to memory that was made for one
    if torch.compiler.is_compiling() or is_batched(slopes):
        return (unit * slopes).to(unit.dtype)
    return torch.mul(unit, slopes, out=torch.empty_like(unit))


class LinearDPO(torch.autograd.Function):
    """(loss, losses [P], logps [2P], chosen and rejected rewards, then, if stats are wanted, token
    logps [N], stats [3, N] and is_top1 [N]); only loss has a gradient.

    The gradients are made in the forward, for an upstream gradient of 1, and scaled in the backward
    into new tensors.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        reference_logps: Tensor | None,
        reference_hidden: Tensor | None,
        reference_weight: Tensor | None,
        reference_bias: Tensor | None,
        options: LinearOptions,
        stats: bool,
        pair: PairArguments,
        needs: Needs,
    ):
        ctx.needs = needs
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.set_materialize_grads(False)
        logps, made, weights, tokens, values, is_top1, *gradients = linear_dpo_op(
            hidden,
            weight,
            bias,
            labels,
            cu_seqlens,
            *options.flat(),
            reference_logps,
            reference_hidden,
            reference_weight,
            reference_bias,
            stats,
            *pair,
            *needs,
        )
        ctx.save_for_backward(hidden, weight, bias, *gradients)
        reference_logps = made if reference_hidden is not None else reference_logps
        layout = SequenceLayout(labels, cu_seqlens, options.rows.ignore_index, options.rows.shift)
        output = reference.pair_output(
            logps.chunk(2),
            (None, None) if reference_logps is None else reference_logps.chunk(2),
            None if pair.average else layout.lengths.chunk(2),
            pair.loss_options(),
            pair.reduction,
            weights if pair.use_weighting else None,
        )
        rewards = (output.chosen_rewards, output.rejected_rewards)
        # an output of its own: the rows of tokens share memory
        token_logps = tokens[0].clone()
        rest = (output.losses, logps, *rewards, token_logps, values, is_top1)
        ctx.mark_non_differentiable(*rest)
        return output.loss, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx, saved: tuple, grad: Tensor | None, *unused):
        nothing = (None,) * 13
        if grad is None:
            return nothing
        scaled = (
            (x * grad).to(dtype) if need and asked else None
            for x, dtype, need, asked in zip(
                saved[3:], ctx.dtypes, ctx.needs, ctx.needs_input_grad, strict=False
            )
        )
        return *scaled, *nothing[3:]
