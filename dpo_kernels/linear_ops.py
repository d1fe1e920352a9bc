"""The ops from hidden states: schemas, fake kernels and registration, as in ops.py.

``hidden`` is ``[S, T, D]`` or ``[N, D]``; its rows lie where the logits' would. Outputs that were
not asked for are empty. head_passes.py runs the head, tile by tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import head_passes
from .head_passes import Needs, PairArguments
from .ops import _library
from .tiles import LinearOptions
from .types import accumulation_dtype

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? cu_seqlens"
_OPTIONS = (
    "int ignore_index, bool shift, float scale, float softcap, float temperature, "
    "ScalarType dtype, str precision, int workspace, str backend"
)
_NEEDS = "bool needs_hidden, bool needs_weight, bool needs_bias"
_library.define(
    f"linear_tokens({_HEAD}, {_OPTIONS}, bool stats, bool unit_gradient) "
    "-> (Tensor tokens, Tensor stats, Tensor is_top1, Tensor unit_gradient)"
)
_library.define(
    f"linear_tokens_backward({_HEAD}, {_OPTIONS}, Tensor tokens, Tensor grad, {_NEEDS}) "
    "-> (Tensor hidden, Tensor weight, Tensor bias)"
)
_library.define(
    f"linear_dpo({_HEAD}, {_OPTIONS}, Tensor? reference_logps, Tensor? reference_hidden, "
    "Tensor? reference_weight, Tensor? reference_bias, bool stats, bool average, "
    "float? ld_alpha, bool use_weighting, str reduction, float beta, str[] loss_types, "
    "float[]? loss_weights, float label_smoothing, bool reference_free, str f_divergence, "
    f"float f_alpha, float discopop_tau, float simpo_gamma, {_NEEDS}) "
    "-> (Tensor logps, Tensor reference_logps, Tensor pair_weights, Tensor tokens, Tensor stats, "
    "Tensor is_top1, Tensor hidden, Tensor weight, Tensor bias)"
)


def _without_autocast(implementation):
    """GEMMs in the dtypes they are given: what autocast asks for is in the arguments already."""

    def run(hidden: Tensor, *args):
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return implementation(hidden, *args)

    return run


def _split(args: tuple) -> tuple[LinearOptions, tuple]:
    return LinearOptions.of(*args[:9]), args[9:]


def _linear_tokens(*args):
    options, rest = _split(args[5:])
    return head_passes.linear_tokens(*args[:5], options, *rest)


def _linear_tokens_fake(*args):
    hidden, labels = args[0], args[3]
    _, (stats, unit_gradient) = _split(args[5:])
    unit = hidden.new_empty(hidden.shape if unit_gradient else (0,))
    return *head_passes.token_outputs(hidden, labels, stats), unit


def _linear_tokens_backward(*args):
    options, (tokens, grad, *needs) = _split(args[5:])
    return head_passes.linear_tokens_backward(*args[:5], options, tokens, grad, Needs(*needs))


def _linear_tokens_backward_fake(*args):
    _, (_, _, *needs) = _split(args[5:])
    return head_passes.gradient_outputs(*args[:3], Needs(*needs), False)


def _linear_dpo(*args):
    options, rest = _split(args[5:])
    pair, needs = PairArguments(*rest[5:-3]), Needs(*rest[-3:])
    return head_passes.linear_dpo(*args[:5], options, *rest[:5], pair, needs)


def _linear_dpo_fake(*args):
    hidden, weight, bias, labels, cu_seqlens = args[:5]
    _, rest = _split(args[5:])
    pair, needs = PairArguments(*rest[5:-3]), Needs(*rest[-3:])
    num_seqs = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = (
        num_seqs,
        0 if rest[1] is None else num_seqs,
        num_seqs // 2 if pair.use_weighting else 0,
    )
    dtype = accumulation_dtype(hidden.dtype)
    return (
        *(hidden.new_empty((size,), dtype=dtype) for size in sizes),
        *head_passes.token_outputs(hidden, labels, rest[4]),
        *head_passes.gradient_outputs(hidden, weight, bias, needs, True),
    )


for _name, _impl, _fake in (
    ("linear_tokens", _linear_tokens, _linear_tokens_fake),
    ("linear_tokens_backward", _linear_tokens_backward, _linear_tokens_backward_fake),
    ("linear_dpo", _linear_dpo, _linear_dpo_fake),
):
    # every device: which backend serves it is dispatch.py's affair
    _library.impl(_name, _without_autocast(_impl), "CompositeExplicitAutograd")
    torch.library.register_fake(f"dpo_kernels::{_name}", _fake, lib=_library)

linear_tokens_op = torch.ops.dpo_kernels.linear_tokens.default
linear_tokens_backward_op = torch.ops.dpo_kernels.linear_tokens_backward.default
linear_dpo_op = torch.ops.dpo_kernels.linear_dpo.default
