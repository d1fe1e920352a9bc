"""What a caller may pass, and the message when it does not fit, before anything runs.

Everything but the values of labels and cu_seqlens, which only the ops have (checks at the end).
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .compat import is_dtensor, transform_of
from .sequences import SequenceLayout
from .types import RowOptions

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
PRECISIONS = ("exact", "fast")
# float32 holds these and their reciprocals without a loss of digits
SMALLEST, LARGEST = 2.0**-126, 2.0**126


def validates() -> bool:
    """Whether DPO_KERNELS_VALIDATE asks for checks of values that may wait for a GPU."""
    return not torch.compiler.is_compiling() and os.environ.get("DPO_KERNELS_VALIDATE") == "1"


def check_dense(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else x.layout
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def check_local(name: str, x: Any) -> None:
    check_dense(name, x)
    if is_dtensor(x):
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor of {x.placements}; where every rank "
            f"computes the same loss, as under tensor parallelism, pass {name}.full_tensor()"
        )


def check_plain(name: str, x: Any) -> None:
    """Refuses what has no memory of its own that a kernel could read."""
    check_local(name, x)
    transform = transform_of(x)
    if transform is not None:
        raise TypeError(
            f"{name}: expected a plain tensor, got one of {transform}, which the kernels do not "
            "support; dpo_kernels.reference does"
        )


def outside_inference(x: Tensor) -> Tensor:
    """``x``, or a copy that autograd may save: small integers made in inference mode are legal."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not x.is_inference():
        return x
    return x.clone()


def check_savable(name: str, x: Tensor) -> None:
    """Of what a backward reads again; large, so it is not copied unasked."""
    if not torch.compiler.is_compiling() and x.is_inference():
        raise ValueError(
            f"{name}: made in inference mode, and autograd cannot save it for the backward; make "
            f"it under torch.no_grad, or pass {name}.clone()"
        )


def check_floating(name: str, x: Any) -> None:
    check_plain(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")


def check_rows(name: str, x: Any, last: str) -> None:
    """Of logits or hidden states; ``last`` says what the last dimension counts."""
    check_floating(name, x)
    if x.dim() < 2 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected [..., rows, {last}], got {list(x.shape)}")


def check_labels(labels: Any, rows: Tensor, owner: str) -> Tensor:
    """labels as int64; ``rows`` is what they label, the argument ``owner``."""
    check_plain("labels", labels)
    if labels.dtype not in INTEGERS:
        raise TypeError(f"labels: expected an integer dtype, got {labels.dtype}")
    if labels.shape != rows.shape[:-1]:
        raise ValueError(
            f"labels: expected {list(rows.shape[:-1])}, like {owner} without its last dimension, "
            f"got {list(labels.shape)}"
        )
    if labels.device != rows.device:
        raise ValueError(f"labels: expected on {rows.device} like {owner}, got {labels.device}")
    return outside_inference(labels if labels.dtype == torch.int64 else labels.to(torch.int64))


def check_cu_seqlens(cu_seqlens: Any, rows: Tensor, owner: str) -> Tensor | None:
    """cu_seqlens as contiguous int64."""
    if cu_seqlens is None:
        return None
    check_plain("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"cu_seqlens: expected int64 or int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            "cu_seqlens: expected one dimension, [number of sequences + 1], "
            f"got {list(cu_seqlens.shape)}"
        )
    if rows.dim() != 2:
        raise ValueError(
            f"cu_seqlens: expected {owner} of two dimensions (packed), got {rows.dim()}"
        )
    if cu_seqlens.device != rows.device:
        raise ValueError(
            f"cu_seqlens: expected on {rows.device} like {owner}, got {cu_seqlens.device}"
        )
    return outside_inference(cu_seqlens.to(torch.int64).contiguous())


def check_padded_or_packed(name: str, x: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None and x.dim() != 3:
        raise ValueError(
            f"{name}: expected three dimensions (or two with cu_seqlens), got {list(x.shape)}"
        )


def check_pairs(name: str, layout: SequenceLayout) -> None:
    if layout.num_seqs % 2:
        raise ValueError(
            f"{name if layout.cu_seqlens is None else 'cu_seqlens'}: expected an even number of "
            f"sequences (chosen, then rejected), got {layout.num_seqs}"
        )


def check_number(name: str, value: Any) -> float:
    """value as a float; of one that is neither 0, infinite nor NaN float32 must hold the digits.

    Options are plain numbers. A tensor is refused: its gradient would be lost on some paths.
    """
    if type(value) is float and (value == 0.0 or SMALLEST <= value <= LARGEST):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that a float holds") from None
    # math.isfinite is not for torch.compile's symbols
    if number != 0 and abs(number) < math.inf and not SMALLEST <= abs(number) <= LARGEST:
        raise ValueError(
            f"{name}: expected 0 or a size from 2**-126 to 2**126, as float32 holds it, got {value}"
        )
    return number


def check_finite(name: str, value: Any) -> float:
    number = check_number(name, value)
    if not abs(number) < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return number


def check_positive(name: str, value: Any) -> float:
    number = check_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value}")
    return number


def check_integer(name: str, value: Any, least: int = -(2**63)) -> int:
    if isinstance(value, bool) or not isinstance(value, int | numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    number = int(value)
    if not least <= number < 2**63:
        raise ValueError(f"{name}: expected an integer from {least} to 2**63 - 1, got {value}")
    return number


def check_flag(name: str, value: Any) -> bool:
    if value is True or value is False:
        return value
    # Python takes a string or a number for True, whatever it was meant to say; bool_ is numpy's
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(choices)}")
    return value


def check_row_options(
    ignore_index: Any, shift: Any, temperature: Any, scale: Any = 1.0, softcap: Any = None
) -> RowOptions:
    return RowOptions(
        check_integer("ignore_index", ignore_index),
        check_flag("shift", shift),
        check_finite("logit_scale", scale),
        0.0 if softcap is None else check_positive("logit_softcap", softcap),
        check_positive("temperature", temperature),
    )


def check_sequence_logps(name: str, x: Any, pairs: int, device: torch.device) -> None:
    # torch.func's transforms of preference_loss are legal: it is plain PyTorch
    check_local(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating point tensor, got {x.dtype}")
    if x.shape != (pairs,):
        raise ValueError(f"{name}: expected one log-prob a pair, [{pairs}], got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected on {device}, got {x.device}")
    if validates() and x.isnan().any():
        pair = int(x.isnan().nonzero()[0])
        raise ValueError(f"{name}[{pair}]: expected a log-prob, got nan")


def check_lengths(name: str, x: Any, pairs: int, device: torch.device) -> None:
    """Numbers of scored tokens; their values on a CPU, elsewhere where values are validated."""
    check_local(name, x)
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected numbers of tokens, got {x.dtype}")
    if x.shape != (pairs,):
        raise ValueError(
            f"{name}: expected [{pairs}] like policy_chosen_logps, got {list(x.shape)}"
        )
    if x.device != device:
        raise ValueError(f"{name}: expected on {device}, got {x.device}")
    looks = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if (looks or validates()) and transform_of(x) is None and not (x >= 0).all():
        raise ValueError(f"{name}: expected numbers of tokens, 0 or more, got {x.min().item()}")


def check_inplace(logits: Tensor) -> None:
    """In place, every logit needs memory of its own, and something before it to be a gradient of.

    The gradient of a leaf would be the leaf itself: an optimiser would subtract one from the other.
    """
    reach = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(
                "inplace_backward: the logits are an expanded or overlapping tensor that shares "
                f"memory, strides {list(logits.stride())} of {list(logits.shape)}"
            )
        reach += stride * max(size - 1, 0)
    if logits.requires_grad and logits.is_leaf:
        raise ValueError(
            "inplace_backward: the logits are a leaf, whose values and .grad would share memory; "
            "expected the output of a model"
        )


def refuse_shard(name: str, x: Any, reason: str) -> NoReturn:
    """For a DTensor of a head: what its gradient needs depends on what it is sharded for."""
    own = f"{name}.full_tensor(grad_placements=[Partial('avg')] * {x.device_mesh.ndim})"
    raise TypeError(
        f"{name}: expected a plain tensor or a parameter that fully_shard alone has sharded, got "
        f"a DTensor of {x.placements}, {reason}. Where every rank computes the same loss, as under "
        f"tensor parallelism, pass {name}.full_tensor(); where every rank has pairs of its own, "
        f"{own}; on a mesh of both kinds, a placement a dimension, Replicate() for the first kind"
    )


def check_weight(name: str, weight: Any) -> None:
    """Refuses what is not a dense ``[V, D]`` matrix, and says what to pass instead."""
    if isinstance(weight, nn.Module):
        if hasattr(weight, "base_layer"):
            raise TypeError(
                f"{name}: got {type(weight).__name__}, a head with an adapter on it; its weight "
                f"alone is another model. Merge the adapter and pass {name}="
                "lm_head.base_layer.weight, or leave the head out of the adapter's target modules"
            )
        raise TypeError(
            f"{name}: expected a tensor, got the module {type(weight).__name__}; pass its .weight"
        )
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(weight).__name__}")
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(
            f"{name}: an empty shard of a parameter that DeepSpeed ZeRO-3 has partitioned; call "
            "inside deepspeed.zero.GatheredParameters([lm_head.weight])"
        )
    if is_dtensor(weight):
        refuse_shard(name, weight, "not a parameter that fully_shard made")
    if (
        weight.is_quantized
        or hasattr(weight, "quant_state")
        or hasattr(type(weight), "__tensor_flatten__")
        or not weight.is_floating_point()
        or weight.itemsize == 1
    ):
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64, got {type(weight).__name__} "
            f"of {weight.dtype}; dequantise the head first, or leave it out of quantisation"
        )
    if weight.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {weight.layout}")
    check_floating(name, weight)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"{name}: expected [vocabulary, hidden size], got {list(weight.shape)}; a head that is "
            "sharded must be gathered first"
        )


def check_head(hidden: Any, weight: Any, bias: Any, prefix: str = "") -> torch.dtype:
    """The dtype of the head's GEMMs."""
    names = [prefix + name for name in ("hidden", "weight", "bias")]
    check_rows(names[0], hidden, "hidden size")
    check_weight(names[1], weight)
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{names[1]}: expected [vocabulary, {hidden.shape[-1]}] for {names[0]} "
            f"{list(hidden.shape)}, got {list(weight.shape)}"
        )
    if bias is not None:
        if is_dtensor(bias):
            refuse_shard(names[2], bias, "not a parameter that fully_shard made")
        check_floating(names[2], bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{names[2]}: expected [{weight.shape[0]}], the vocabulary, got {list(bias.shape)}"
            )
    for name, x in zip(names[1:], (weight, bias), strict=True):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name}: expected on {hidden.device} like {names[0]}, got {x.device}")
    return _gemm_dtype(names, hidden, weight, bias)


def _gemm_dtype(names: Sequence[str], hidden: Tensor, weight: Tensor, bias: Any) -> torch.dtype:
    device = hidden.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    for name, x in zip(names[1:], (weight, bias), strict=True):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{name}: expected {hidden.dtype} like {names[0]}, got {x.dtype}; convert one of "
                f"them, or call under torch.autocast({device!r})"
            )
    return hidden.dtype


def check_precision(precision: Any) -> str:
    return check_choice("precision", precision, PRECISIONS)


def check_values(layout: SequenceLayout, vocab: int, backend_checks_labels: bool) -> None:
    """Values of labels and cu_seqlens: on the CPU always, on a GPU only when asked to wait."""
    on_cpu = layout.labels.device.type == "cpu"
    if not on_cpu and not validates():
        return
    if layout.cu_seqlens is not None:
        bounds, count = layout.cu_seqlens.tolist(), layout.labels.shape[0]
        ordered = all(a <= b for a, b in pairwise(bounds))
        if not bounds or not ordered or bounds[0] != 0 or bounds[-1] != count:
            raise ValueError(
                "cu_seqlens: expected to rise from 0 to the number of rows, "
                f"{count}, got {bounds if len(bounds) < 20 else [*bounds[:20], '...']}"
            )
    if not (on_cpu and backend_checks_labels):
        labels = layout.scored_labels
        outside = layout.scored & ((labels < 0) | (labels >= vocab))
        if outside.any():
            raise_bad_label(layout, vocab, int(outside.nonzero()[0]))


def raise_bad_label(layout: SequenceLayout, vocab: int, token: int) -> None:
    labels = layout.labels
    position = [token]
    if labels.dim() == 2:
        position = [token // labels.shape[1], token % labels.shape[1]]
    raise ValueError(
        f"labels{position}: expected ignore_index ({layout.ignore_index}) or "
        f"0 <= label < {vocab}, got {int(labels[tuple(position)])}"
    )
