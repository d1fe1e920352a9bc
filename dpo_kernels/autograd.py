"""torch.autograd.Functions over the ops: one per public result.

A Function saves the logits and O(tokens) more. Its backward is one op: the coefficient of a row is
looked up, per token, sequence or pair, while the gradient is written.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .ops import (
    backward_inplace_op,
    backward_op,
    dpo_forward_op,
    sequence_forward_op,
    token_forward_op,
)


class RowOptions(NamedTuple):
    """How rows are scored; the order is that of the ops' schema."""

    ignore_index: int
    shift: bool
    scale: float
    softcap: float
    temperature: float


class CallOptions(NamedTuple):
    rows: RowOptions
    backend: str
    inplace_backward: bool


class PairOptions(NamedTuple):
    """The fused sigmoid loss."""

    average: bool
    beta: float
    label_smoothing: float
    mean: bool
    per_pair: bool


class NoDoubleBackward(torch.autograd.Function):
    """Identity of a gradient that raises when something differentiates through it."""

    @staticmethod
    def forward(ctx, grad: Tensor, logits: Tensor):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise RuntimeError(
            "dpo_kernels: the gradient of the logits has no gradient of its own (double backward); "
            "dpo_kernels.reference is twice differentiable"
        )


def once_differentiable(backward):
    """For ``backward(ctx, saved, *grads)``, whose saved tensors begin with the inputs, in order.

    torch's decorator of this name keeps silent where the upstream gradient is a constant: with
    create_graph=True a penalty on the gradient would be left out without a word.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grads: Tensor | None):
        # once, as checkpoints allow; after an in-place backward this is where a second one fails
        saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = list(backward(ctx, saved, *grads))
        if torch.is_grad_enabled():
            for i, gradient in enumerate(gradients):
                if gradient is not None:
                    gradients[i] = NoDoubleBackward.apply(gradient, saved[i])
        return tuple(gradients)

    return wrapper


def _save(ctx, options: CallOptions, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _logits_gradient(ctx, saved: tuple, grad: Tensor, grad_index: str) -> Tensor:
    logits, labels, cu_seqlens, tokens, scale = saved
    rows, backend, inplace = ctx.options
    arguments = (labels, cu_seqlens, *rows, grad, grad_index, scale, tokens, backend)
    if not inplace:
        return backward_op(logits, *arguments)
    logits = logits.detach()
    backward_inplace_op(logits, *arguments)
    return logits


class TokenLogps(torch.autograd.Function):
    """(logps like labels, stats [3, N], is_top1 [N]); only logps has a gradient."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, cu_seqlens, options: CallOptions, stats: bool):
        tokens, stats_values, is_top1 = token_forward_op(
            logits, labels, cu_seqlens, *options.rows, stats, options.backend
        )
        _save(ctx, options, logits, labels, cu_seqlens, tokens, None)
        logps = tokens[0].view(labels.shape).clone()
        ctx.mark_non_differentiable(stats_values, is_top1)
        return logps, stats_values, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx, saved: tuple, grad: Tensor | None, *unused):
        if grad is None or not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        return _logits_gradient(ctx, saved, grad.reshape(-1), "token"), None, None, None, None


class SequenceLogps(torch.autograd.Function):
    """(logps [S], counts [S])."""

    @staticmethod
    def forward(
        ctx, logits: Tensor, labels: Tensor, cu_seqlens, options: CallOptions, average: bool
    ):
        tokens, seqs, counts = sequence_forward_op(
            logits, labels, cu_seqlens, *options.rows, average, options.backend
        )
        logps, scale = seqs[0].clone(), seqs[1]
        _save(ctx, options, logits, labels, cu_seqlens, tokens, scale)
        ctx.mark_non_differentiable(counts)
        return logps, counts

    @staticmethod
    @once_differentiable
    def backward(ctx, saved: tuple, grad: Tensor | None, *unused):
        if grad is None or not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        return _logits_gradient(ctx, saved, grad, "sequence"), None, None, None, None


class SigmoidDPO(torch.autograd.Function):
    """(loss, losses [P], seqs [3, 2P]); the gradient enters at loss, or at losses with per_pair."""

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        labels: Tensor,
        cu_seqlens,
        reference_logps,
        options: CallOptions,
        pair: PairOptions,
    ):
        tokens, seqs, _, losses, loss = dpo_forward_op(
            logits,
            labels,
            cu_seqlens,
            *options.rows,
            pair.average,
            reference_logps,
            pair.beta,
            pair.label_smoothing,
            pair.mean,
            options.backend,
        )
        _save(ctx, options, logits, labels, cu_seqlens, tokens, seqs[1])
        ctx.per_pair = pair.per_pair
        ctx.mark_non_differentiable(loss if pair.per_pair else losses, seqs)
        return loss, losses, seqs

    @staticmethod
    @once_differentiable
    def backward(ctx, saved: tuple, grad_loss: Tensor | None, grad_losses: Tensor | None, *unused):
        grad = grad_losses if ctx.per_pair else grad_loss
        if grad is None or not ctx.needs_input_grad[0]:
            return None, None, None, None, None, None
        return _logits_gradient(ctx, saved, grad, "pair"), None, None, None, None, None
