"""torch.library schemas, fake kernels and implementations: the boundary that torch.compile sees.

The implementations allocate, check values that only a real tensor has, and hand over to a backend.
Autograd stays outside, in autograd.py. Outputs are few stacked tensors, because every output costs
an allocation: ``tokens [3, N]`` is (logps, row_max, log_sum), ``seqs [2 or 3, S]`` is (logps,
scale, rewards), ``stats [3, N]`` is (entropy, mean_logits, log_sum_sq_probs).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .backends.batch import (
    ForwardOutputs,
    GradOutput,
    PairLoss,
    TokenBatch,
    check_backward,
    check_forward,
)
from .checks import check_values, raise_bad_label
from .dispatch import resolve
from .sequences import SequenceLayout
from .types import Tokens

_BATCH_SCHEMA = (
    "Tensor labels, Tensor? cu_seqlens, int ignore_index, bool shift, "
    "float scale, float softcap, float temperature, int vocab_start, int vocab_total"
)
library = torch.library.Library("dpo_kernels", "DEF")
library.define(
    f"token_forward(Tensor logits, {_BATCH_SCHEMA}, bool stats, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)
library.define(
    f"sequence_forward(Tensor logits, {_BATCH_SCHEMA}, bool average, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)
library.define(
    f"dpo_forward(Tensor logits, {_BATCH_SCHEMA}, bool average, Tensor? reference_logps, "
    "float beta, float label_smoothing, bool mean, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_GRAD = "Tensor grad, str grad_index, Tensor? seq_scale, Tensor tokens"
library.define(f"backward(Tensor logits, {_BATCH_SCHEMA}, {_GRAD}, str backend) -> Tensor")
library.define(f"backward_(Tensor(a!) logits, {_BATCH_SCHEMA}, {_GRAD}, str backend) -> ()")


def make_outputs(
    batch: TokenBatch, *, stats=False, seqs=0, pairs=False, average=False
) -> ForwardOutputs:
    """Uninitialised outputs of a forward; a backend fills every element."""
    n, s, dtype = batch.num_tokens, batch.num_seqs, batch.acc_dtype
    empty = batch.logits.new_empty
    return ForwardOutputs(
        tokens=empty((3, n), dtype=dtype),
        stats=empty((3, n), dtype=dtype) if stats else None,
        is_top1=empty((n,), dtype=torch.bool) if stats else None,
        seqs=empty((seqs, s), dtype=dtype) if seqs else None,
        counts=empty((s,), dtype=torch.int64) if seqs else None,
        losses=empty((s // 2,), dtype=dtype) if pairs else None,
        loss=empty((), dtype=dtype) if pairs else None,
        average=average,
    )


def _none(batch: TokenBatch, dtype: torch.dtype) -> Tensor:
    # an op cannot leave an output out
    return batch.logits.new_empty((0,), dtype=dtype)


def token_results(batch: TokenBatch, out: ForwardOutputs) -> Tokens:
    if out.stats is None or out.is_top1 is None:
        return Tokens(out.tokens, _none(batch, batch.acc_dtype), _none(batch, torch.bool))
    return Tokens(out.tokens, out.stats, out.is_top1)


def run_forward(
    module: ModuleType, batch: TokenBatch, pair: PairLoss | None, out: ForwardOutputs
) -> ForwardOutputs:
    """Every forward over logits, held whole or a tile, goes through here."""
    check_forward(batch, pair, out)
    bad = module.forward(batch, pair, out)
    if bad >= 0:
        raise_bad_label(_layout(batch), batch.labels_below, bad)
    return out


def run_backward(
    module: ModuleType,
    batch: TokenBatch,
    tokens: Tensor,
    grad_output: GradOutput,
    grad_logits: Tensor,
    zero_unscored: bool,
) -> None:
    """And every backward."""
    check_backward(batch, tokens, grad_output, grad_logits, module.CASTS_GRADIENT)
    bad = module.backward(batch, tokens, grad_output, grad_logits, zero_unscored)
    if bad >= 0:
        raise_bad_label(_layout(batch), batch.labels_below, bad)


def _layout(batch: TokenBatch) -> SequenceLayout:
    return SequenceLayout(batch.labels, batch.cu_seqlens, batch.ignore_index, batch.shift)


def _forward(batch: TokenBatch, pair: PairLoss | None, out: ForwardOutputs, backend: str) -> None:
    module = resolve(backend, batch.logits.device, batch.logits.dtype)
    if batch.cu_seqlens is not None or not module.CHECKS_LABELS:
        check_values(_layout(batch), batch.labels_below, module.CHECKS_LABELS)
    run_forward(module, batch, pair, out)


def _backward(batch: TokenBatch, grad, index, seq_scale, tokens, backend, out=None) -> Tensor:
    module = resolve(backend, batch.logits.device, batch.logits.dtype)
    grad = grad.to(batch.acc_dtype)
    # an expanded scalar, as .sum().backward() makes it, needs no copy
    scalar = grad.numel() == 1 or not any(grad.stride())
    grad_output = GradOutput(
        grad=grad if scalar else grad.contiguous(),
        stride=0 if scalar else 1,
        index=index,
        scale=seq_scale,
    )
    zeroed = False
    if out is None:
        out, zeroed = module.empty_gradient(batch)
    run_backward(module, batch, tokens, grad_output, out, not zeroed)
    return out


def _batch(args: tuple) -> tuple[TokenBatch, tuple]:
    return TokenBatch(*args[:10]), args[10:]


def token_forward(*args):
    batch, (stats, backend) = _batch(args)
    out = make_outputs(batch, stats=stats)
    _forward(batch, None, out, backend)
    return tuple(token_results(batch, out))


def _token_forward_fake(*args):
    batch, (stats, _) = _batch(args)
    return tuple(token_results(batch, make_outputs(batch, stats=stats)))


def sequence_forward(*args):
    batch, (average, backend) = _batch(args)
    out = make_outputs(batch, seqs=2, average=average)
    _forward(batch, None, out, backend)
    return out.tokens, out.seqs, out.counts


def _sequence_forward_fake(*args):
    out = make_outputs(_batch(args)[0], seqs=2)
    return out.tokens, out.seqs, out.counts


def dpo_forward(*args):
    batch, (average, reference_logps, beta, label_smoothing, mean, backend) = _batch(args)
    # made here: as an argument it would make torch.compile specialise on the number of pairs
    weight = 1.0 / max(batch.num_seqs // 2, 1) if mean else 1.0
    out = make_outputs(batch, seqs=3, pairs=True, average=average)
    _forward(batch, PairLoss(reference_logps, beta, label_smoothing, weight), out, backend)
    return out.tokens, out.seqs, out.counts, out.losses, out.loss


def _dpo_forward_fake(*args):
    out = make_outputs(_batch(args)[0], seqs=3, pairs=True)
    return out.tokens, out.seqs, out.counts, out.losses, out.loss


def backward(*args):
    batch, (grad, index, seq_scale, tokens, backend) = _batch(args)
    return _backward(batch, grad, index, seq_scale, tokens, backend)


def _backward_fake(logits, *args):
    return logits.new_empty(logits.shape)


def backward_inplace(*args):
    batch, (grad, index, seq_scale, tokens, backend) = _batch(args)
    _backward(batch, grad, index, seq_scale, tokens, backend, out=batch.logits)
    torch.autograd.graph.increment_version(batch.logits)


def _backward_inplace_fake(*args):
    return None


for _name, _impl, _fake in (
    ("token_forward", token_forward, _token_forward_fake),
    ("sequence_forward", sequence_forward, _sequence_forward_fake),
    ("dpo_forward", dpo_forward, _dpo_forward_fake),
    ("backward", backward, _backward_fake),
    ("backward_", backward_inplace, _backward_inplace_fake),
):
    # every device: which backend serves it is dispatch.py's affair
    library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dpo_kernels::{_name}", _fake, lib=library)

# bound once: attribute look-ups on torch.ops cost as much as a small kernel
token_forward_op = torch.ops.dpo_kernels.token_forward.default
sequence_forward_op = torch.ops.dpo_kernels.sequence_forward.default
dpo_forward_op = torch.ops.dpo_kernels.dpo_forward.default
backward_op = torch.ops.dpo_kernels.backward.default
backward_inplace_op = torch.ops.dpo_kernels.backward_.default
