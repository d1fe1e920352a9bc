"""The ops from hidden states, as ops.py has them from logits, and the Functions over them.

``hidden`` is ``[S, T, D]`` or ``[N, D]``; its rows lie where the logits' would. Outputs that were
not asked for are empty. passes.py runs the head, tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..autograd import once_differentiable
from ..checks import check_values
from ..compat import is_batched
from ..ops import library
from ..sequences import SequenceLayout
from ..types import LossOptions, accumulation_dtype
from . import passes
from .workspace import NUM_OPTIONS, HeadOptions, Needs

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? cu_seqlens"
_OPTIONS = (
    "int ignore_index, bool shift, float scale, float softcap, float temperature, "
    "int vocab_start, int vocab_total, ScalarType dtype, str precision, int workspace, "
    "str backend, str vocab_group, int tile_rows, int most_rows, SymInt? promised"
)
_LOSS_OPTIONS = (
    "str[] loss_types, float[] loss_weights, float beta, float label_smoothing, "
    "bool reference_free, str f_divergence, float f_alpha_divergence_coef, float discopop_tau, "
    "float simpo_gamma, bool average_log_prob, float? ld_alpha, bool use_weighting, str reduction"
)
_NEEDS = "bool needs_hidden, bool needs_weight, bool needs_bias"
library.define(
    f"linear_tokens({_HEAD}, {_OPTIONS}, bool stats, bool unit_gradient) "
    "-> (Tensor tokens, Tensor stats, Tensor is_top1, Tensor unit_gradient)"
)
library.define(
    f"linear_tokens_backward({_HEAD}, {_OPTIONS}, Tensor tokens, Tensor grad, {_NEEDS}) "
    "-> (Tensor hidden, Tensor weight, Tensor bias)"
)
library.define(
    f"linear_dpo({_HEAD}, {_OPTIONS}, Tensor? reference_logps, Tensor? reference_hidden, "
    f"Tensor? reference_weight, Tensor? reference_bias, bool stats, {_LOSS_OPTIONS}, {_NEEDS}) "
    "-> (Tensor loss, Tensor losses, Tensor seqs, Tensor logps, Tensor stats, Tensor is_top1, "
    "Tensor hidden, Tensor weight, Tensor bias)"
)


def _layout(labels: Tensor, cu_seqlens: Tensor | None, options: HeadOptions) -> SequenceLayout:
    return SequenceLayout(labels, cu_seqlens, options.rows.ignore_index, options.rows.shift)


def _implements(passes_over: Callable) -> Callable:
    """The op of a function of passes.py: (hidden, weight, bias, layout, options, *rest)."""

    def run(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *args):
        options = HeadOptions.of(*args[1 : 1 + NUM_OPTIONS])
        layout = _layout(labels, args[0], options)
        check_values(layout, options.rows.vocab_total or weight.shape[0], False)
        # GEMMs in the dtypes they are given: what autocast asks for is in the options already
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return passes_over(hidden, weight, bias, layout, options, *args[1 + NUM_OPTIONS :])

    return run


def _linear_tokens_backward(*args) -> tuple[Tensor, ...]:
    return passes.linear_tokens_backward(*args[:-3], needs=Needs(*args[-3:]))


def _linear_dpo(*args) -> tuple[Tensor, ...]:
    # an op is given lists
    loss_options = LossOptions(tuple(args[10]), tuple(args[11]), *args[12:-3])
    return passes.linear_dpo(*args[:10], loss_options=loss_options, needs=Needs(*args[-3:]))


def _linear_tokens_fake(*args) -> tuple[Tensor, ...]:
    hidden, labels, stats, unit_gradient = args[0], args[3], *args[-2:]
    unit = hidden.new_empty(hidden.shape if unit_gradient else (0,))
    return *passes.token_outputs(hidden, labels, stats), unit


def _linear_tokens_backward_fake(*args) -> tuple[Tensor, ...]:
    return passes.gradient_outputs(*args[:3], needs=Needs(*args[-3:]), made_in_forward=False)


def _linear_dpo_fake(*args) -> tuple[Tensor, ...]:
    hidden, weight, bias, labels, cu_seqlens = args[:5]
    stats, needs = args[9 + NUM_OPTIONS], Needs(*args[-3:])
    num_seqs = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = accumulation_dtype(hidden.dtype)
    sizes = ((), (num_seqs // 2,), (3, num_seqs))
    tokens, *others = passes.token_outputs(hidden, labels if stats else labels[:0], stats)
    return (
        *(hidden.new_empty(size, dtype=dtype) for size in sizes),
        tokens[0].clone(),
        *others,
        *passes.gradient_outputs(hidden, weight, bias, needs, True),
    )


for _name, _impl, _fake in (
    ("linear_tokens", passes.linear_tokens, _linear_tokens_fake),
    ("linear_tokens_backward", _linear_tokens_backward, _linear_tokens_backward_fake),
    ("linear_dpo", _linear_dpo, _linear_dpo_fake),
):
    # every device: which backend serves it is dispatch.py's affair
    library.impl(_name, _implements(_impl), "CompositeExplicitAutograd")
    torch.library.register_fake(f"dpo_kernels::{_name}", _fake, lib=library)

linear_tokens_op = torch.ops.dpo_kernels.linear_tokens.default
linear_tokens_backward_op = torch.ops.dpo_kernels.linear_tokens_backward.default
linear_dpo_op = torch.ops.dpo_kernels.linear_dpo.default


class LinearTokenLogps(torch.autograd.Function):
    """(logps [N], stats [3, N], is_top1 [N]); only logps has a gradient.

    With a frozen head the forward makes what the backward scales, d logp_r / d hidden_r, so nothing
    is computed twice. With a trainable one the backward computes the logits again.
    """

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        labels,
        cu_seqlens,
        options: HeadOptions,
        stats: bool,
        needs: Needs,
    ):
        ctx.unit = needs.hidden and not (needs.weight or needs.bias)
        ctx.options, ctx.needs = options, needs
        ctx.set_materialize_grads(False)
        tokens, values, is_top1, unit = linear_tokens_op(
            hidden, weight, bias, labels, cu_seqlens, *options.flat(), stats, ctx.unit
        )
        # a head that the backward does not read may have been gathered for this call
        head = (hidden, None, None) if ctx.unit else (hidden, weight, bias)
        ctx.save_for_backward(*head, labels, cu_seqlens, unit if ctx.unit else tokens)
        ctx.mark_non_differentiable(values, is_top1)
        return tokens[0].clone(), values, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple, grad: Tensor | None, *unused: None):
        nothing = (None,) * 8
        if grad is None or not any(ctx.needs_input_grad):
            return nothing
        *head, labels, cu_seqlens, made = saved
        if ctx.unit:
            layout = _layout(labels, cu_seqlens, ctx.options)
            return _scaled_rows(made, grad, layout), *nothing[1:]
        needs = Needs(*(a and b for a, b in zip(ctx.needs, ctx.needs_input_grad, strict=False)))
        gradients = linear_tokens_backward_op(
            *head, labels, cu_seqlens, *ctx.options.flat(), made, grad, *needs
        )
        asked = (x if need else None for x, need in zip(gradients, needs, strict=True))
        return *asked, *nothing[3:]


def _scaled_rows(unit: Tensor, grad: Tensor, layout: SequenceLayout) -> Tensor:
    """``unit`` [..., D], each row times the gradient of the token that it scores."""
    # that of a token that is not scored may be anything, NaN among them
    factors = layout.of_rows(grad.masked_fill(~layout.scored, 0.0)).view(*unit.shape[:-1], 1)
    # a batch of gradients cannot be written to memory that was made for one
    if torch.compiler.is_compiling() or is_batched(factors):
        return (unit * factors).to(unit.dtype)
    return torch.mul(unit, factors, out=torch.empty_like(unit))


class LinearDPO(torch.autograd.Function):
    """(loss, losses [P], seqs [3, 2P], then token logps [N], stats [3, N] and is_top1 [N], empty
    where not asked for); only loss has a gradient.

    The gradients are made in the forward, for a grad_output of 1, and scaled in the backward into
    new tensors.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, cu_seqlens, reference_logps, *rest):
        *reference_head, options, stats, loss_options, ctx.needs, ways = rest
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.set_materialize_grads(False)
        inputs = (hidden, weight, bias, labels, cu_seqlens, *options.flat(), reference_logps)
        loss, *others = linear_dpo_op(*inputs, *reference_head, stats, *loss_options, *ctx.needs)
        outputs, gradients = others[:-3], others[-3:]
        # no backward reads the head: who differentiates twice has only to be found
        ctx.save_for_backward(hidden, *(ways or (weight, bias)), *gradients)
        ctx.mark_non_differentiable(*outputs)
        return loss, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple, grad: Tensor | None, *unused: None):
        nothing = (None,) * 14
        if grad is None:
            return nothing
        scaled = (
            (x * grad).to(dtype) if need and asked else None
            for x, dtype, need, asked in zip(
                saved[3:], ctx.dtypes, ctx.needs, ctx.needs_input_grad, strict=False
            )
        )
        return *scaled, *nothing[3:]
