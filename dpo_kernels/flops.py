"""What torch.utils.flop_counter counts for the ops from hidden states: their GEMMs, 2 N D V each.

Importing this module registers the formulas; a FlopCounterMode knows those that were there when it
was made. (dpo_kernels does not import it: torch's counter imports Triton, which takes time.) N are
the rows that score a token, which no shape tells: counting looks at the labels.
"""

from __future__ import annotations

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .linear.ops import linear_dpo_op, linear_tokens_backward_op, linear_tokens_op
from .linear.workspace import NUM_OPTIONS
from .sequences import SequenceLayout


def _gemm(hidden: Tensor, weight: Tensor, labels: Tensor, cu_seqlens, ignore_index, shift) -> int:
    layout = SequenceLayout(labels, cu_seqlens, ignore_index, shift)
    return 2 * int(layout.scored.sum()) * hidden.shape[-1] * weight.shape[0]


def _tokens(*args, out_val=None) -> int:
    """The logits, and with unit_gradient what becomes the gradient of hidden."""
    hidden, weight, _, labels, cu_seqlens, ignore_index, shift, *_, unit_gradient = args
    return (1 + unit_gradient) * _gemm(hidden, weight, labels, cu_seqlens, ignore_index, shift)


def _tokens_backward(*args, out_val=None) -> int:
    """The logits once more, and a GEMM for hidden and for weight."""
    hidden, weight, _, labels, cu_seqlens, ignore_index, shift, *_, for_hidden, for_weight, _ = args
    gemm = _gemm(hidden, weight, labels, cu_seqlens, ignore_index, shift)
    return (1 + for_hidden + for_weight) * gemm


def _dpo(*args, out_val=None) -> int:
    """As _tokens_backward, and the logits of reference_hidden, whose own head may be another."""
    hidden, weight, _, labels, cu_seqlens, ignore_index, shift = args[:7]
    _, reference_hidden, reference_weight, *_ = args[5 + NUM_OPTIONS :]
    layout = (labels, cu_seqlens, ignore_index, shift)
    total = (1 + sum(args[-3:-1])) * _gemm(hidden, weight, *layout)
    if reference_hidden is not None:
        head = weight if reference_weight is None else reference_weight
        total += _gemm(reference_hidden, head, *layout)
    return total


for _op, _formula in (
    (linear_tokens_op, _tokens),
    (linear_tokens_backward_op, _tokens_backward),
    (linear_dpo_op, _dpo),
):
    register_flop_formula(_op.overloadpacket, get_raw=True)(_formula)
