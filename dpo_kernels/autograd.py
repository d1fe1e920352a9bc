"""torch.autograd.Functions over the ops: one per public result.

A Function saves the logits and O(tokens) more. Its backward is one op: the coefficient of a row is
looked up, per token, sequence or pair, while the gradient is written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .compat import is_seen
from .parallel.groups import ALONE, Groups
from .parallel.vocabulary import UNKNOWN_TOTAL, token_forward
from .sequences import SequenceLayout
from .types import LossOptions, RowOptions, Tokens


class CallOptions(NamedTuple):
    rows: RowOptions
    backend: str
    inplace_backward: bool
    groups: Groups = ALONE


class NoDoubleBackward(torch.autograd.Function):
    """Identity of a gradient that raises when something differentiates through it."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, logits: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "dpo_kernels: the gradient of the logits has no gradient of its own (double backward); "
            "dpo_kernels.reference is twice differentiable"
        )


def call_op(name: str, *arguments: Any, seen: Tensor | None = None) -> Any:
    """The op of this name, or where nobody would see it what it runs: the dispatcher takes 10 us.

    ``seen``: the argument that a transform would have wrapped, if it is not the first.
    """
    is_op = is_seen(arguments[0] if seen is None else seen)
    return getattr(ops, f"{name}_op" if is_op else name)(*arguments)


def once_differentiable(backward: Any) -> Any:
    """For ``backward(ctx, saved, *grads)``, whose saved tensors begin with the inputs, in order.

    torch's decorator of this name keeps silent where grad_output is a constant: with
    create_graph=True a penalty on the gradient would be left out without a word.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None):
        # once, as checkpoints allow; after an in-place backward this is where a second one fails
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return backward(ctx, saved, *grads)
        with torch.no_grad():
            gradients = list(backward(ctx, saved, *grads))
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                gradients[i] = NoDoubleBackward.apply(gradient, saved[i])
        return tuple(gradients)

    return wrapper


def _save(ctx: Any, options: CallOptions, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _logits_gradient(ctx: Any, saved: tuple, grad: Tensor | None, index: str, inputs: int) -> tuple:
    """The gradients of a Function of so many inputs, the logits the first of them."""
    rest = (None,) * (inputs - 1)
    if grad is None or not ctx.needs_input_grad[0]:
        return None, *rest
    logits, labels, cu_seqlens, tokens, scale = saved
    rows, backend, inplace, _ = ctx.options
    logits = logits.detach()
    arguments = (logits, labels, cu_seqlens, *rows, grad, index, scale, tokens, backend)
    if not inplace:
        return call_op("backward", *arguments, seen=grad), *rest
    call_op("backward_inplace", *arguments, seen=grad)
    return logits, *rest


def _sharded_token_forward(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, options: CallOptions, stats: bool
) -> tuple[Tokens, CallOptions]:
    """The whole rows' results, and the options with this rank's place in the vocabulary."""
    rows, group = options.rows, options.groups.vocab
    layout = SequenceLayout(labels, cu_seqlens, rows.ignore_index, rows.shift)
    if labels.device.type == "cpu":
        # what is out of range raises when all ranks know the range
        in_range = labels.clamp(0, UNKNOWN_TOTAL - 1)
        labels = in_range.where(labels != rows.ignore_index, labels)

    def place(start: int) -> RowOptions:
        return rows._replace(vocab_start=start, vocab_total=UNKNOWN_TOTAL)

    def run(start: int) -> Tokens:
        arguments = (logits, labels, cu_seqlens, *place(start), stats, options.backend)
        made = call_op("token_forward", *arguments)
        return Tokens(*made)

    merged, start = token_forward(group, layout, logits.shape[-1], run)
    return merged, options._replace(rows=place(start))


class TokenLogps(torch.autograd.Function):
    """(logps [N], stats [3, N], is_top1 [N]); only logps has a gradient."""

    apply: Callable[..., tuple[Tensor, Tensor, Tensor]]

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, cu_seqlens, options: CallOptions, stats: bool):
        if options.groups.vocab is None:
            tokens, stats_values, is_top1 = call_op(
                "token_forward",
                logits,
                labels,
                cu_seqlens,
                *options.rows,
                stats,
                options.backend,
            )
        else:
            (tokens, stats_values, is_top1), options = _sharded_token_forward(
                logits, labels, cu_seqlens, options, stats
            )
        _save(ctx, options, logits, labels, cu_seqlens, tokens, None)
        ctx.mark_non_differentiable(stats_values, is_top1)
        # the backward reads tokens[0], which a caller may change in place
        return tokens[0].clone(), stats_values, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple, grad: Tensor | None, *unused: None):
        return _logits_gradient(ctx, saved, grad, "token", 5)


class SequenceLogps(torch.autograd.Function):
    """(logps [S], counts [S])."""

    apply: Callable[..., tuple[Tensor, Tensor]]

    @staticmethod
    def forward(
        ctx, logits: Tensor, labels: Tensor, cu_seqlens, options: CallOptions, average: bool
    ):
        tokens, seqs, counts = call_op(
            "sequence_forward",
            logits,
            labels,
            cu_seqlens,
            *options.rows,
            average,
            options.backend,
        )
        _save(ctx, options, logits, labels, cu_seqlens, tokens, seqs[1])
        ctx.mark_non_differentiable(counts)
        return seqs[0].clone(), counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple, grad: Tensor | None, *unused: None):
        return _logits_gradient(ctx, saved, grad, "sequence", 5)


class SigmoidDPO(torch.autograd.Function):
    """(loss, losses [P], seqs [3, 2P]); reduction="none" differentiates losses, another loss."""

    apply: Callable[..., tuple[Tensor, Tensor, Tensor]]

    @staticmethod
    def forward(
        ctx, logits, labels, cu_seqlens, reference_logps, options: CallOptions, loss: LossOptions
    ):
        tokens, seqs, _, losses, total = call_op(
            "dpo_forward",
            logits,
            labels,
            cu_seqlens,
            *options.rows,
            loss.average_log_prob,
            reference_logps,
            loss.beta,
            loss.label_smoothing,
            loss.reduction == "mean",
            options.backend,
        )
        _save(ctx, options, logits, labels, cu_seqlens, tokens, seqs[1])
        ctx.per_pair = loss.reduction == "none"
        ctx.mark_non_differentiable(total if ctx.per_pair else losses, seqs)
        return total, losses, seqs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple, loss: Tensor | None, losses: Tensor | None, *unused: None):
        return _logits_gradient(ctx, saved, losses if ctx.per_pair else loss, "pair", 6)
