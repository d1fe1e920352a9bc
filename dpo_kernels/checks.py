"""Validation of what users pass: shapes, dtypes and devices, before anything runs.

Values (labels, cu_seqlens) are checked where real tensors are at hand, in ops.py.
"""

from __future__ import annotations

import math
import numbers
import os

import numpy as np
import torch
from torch import Tensor

from .compat import transform_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("mean", "sum", "none")
# float32 holds these and their reciprocals without a loss of digits
SMALLEST, LARGEST = 2.0**-126, 2.0**126


def check_dense(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else x.layout
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def check_plain(name: str, x) -> None:
    """Refuses what has no memory of its own that a kernel could read."""
    check_dense(name, x)
    if type(x).__name__ == "DTensor":
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor of {x.placements}; where every rank "
            f"computes the same loss, as under tensor parallelism, pass {name}.full_tensor()"
        )
    transform = transform_of(x)
    if transform is not None:
        raise TypeError(
            f"{name}: expected a plain tensor, got one of {transform}, which the kernels do not "
            "support; dpo_kernels.reference does"
        )


def check_floating(name: str, x) -> None:
    check_plain(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")


def validates() -> bool:
    """Whether DPO_KERNELS_VALIDATE asks for checks of values that may wait for a GPU."""
    return not torch.compiler.is_compiling() and os.environ.get("DPO_KERNELS_VALIDATE") == "1"


def outside_inference(x: Tensor) -> Tensor:
    """``x``, or a copy that autograd may save: small integers made in inference mode are legal."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not x.is_inference():
        return x
    return x.clone()


def check_labels(labels, shape: torch.Size, device: torch.device, owner: str) -> Tensor:
    """labels as int64; ``shape`` is what they must have, ``owner`` the argument it comes from."""
    check_plain("labels", labels)
    if labels.dtype not in INTEGERS:
        raise TypeError(f"labels: expected an integer dtype, got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(
            f"labels: expected {list(shape)}, like {owner} without its last dimension, "
            f"got {list(labels.shape)}"
        )
    if labels.device != device:
        raise ValueError(f"labels: expected on {device} like {owner}, got {labels.device}")
    labels = labels if labels.dtype == torch.int64 else labels.to(torch.int64)
    return outside_inference(labels)


def check_cu_seqlens(cu_seqlens, dims: int, device: torch.device, owner: str) -> Tensor | None:
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
    if dims != 2:
        raise ValueError(f"cu_seqlens: expected {owner} of two dimensions (packed), got {dims}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected on {device} like {owner}, got {cu_seqlens.device}")
    return outside_inference(cu_seqlens.to(torch.int64).contiguous())


def check_padded_or_packed(name: str, x: Tensor, cu_seqlens) -> None:
    if cu_seqlens is None and x.dim() != 3:
        raise ValueError(
            f"{name}: expected three dimensions (or two with cu_seqlens), got {list(x.shape)}"
        )


def check_pairs(num_seqs: int, what: str) -> None:
    if num_seqs % 2:
        raise ValueError(
            f"{what}: expected an even number of sequences (chosen, then rejected), got {num_seqs}"
        )


def check_number(name: str, value) -> float:
    """value as a float; of one that is neither 0, infinite nor NaN float32 must hold the digits."""
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


def check_finite(name: str, value) -> float:
    number = check_number(name, value)
    if not abs(number) < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return number


def check_positive(name: str, value) -> float:
    number = check_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value}")
    return number


def check_flag(name: str, value) -> bool:
    # a string or a number is taken for True by Python, whatever it was meant to say
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def check_choice(name: str, value, choices) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(choices)}")
    return value


def check_loss_type(loss_type):
    """A name, a callable, or a tuple of them."""
    if isinstance(loss_type, str) or callable(loss_type):
        return loss_type
    if not isinstance(loss_type, list | tuple):
        raise TypeError(
            "loss_type: expected a name, a callable or a list of them, "
            f"got {type(loss_type).__name__}"
        )
    for member in loss_type:
        if not isinstance(member, str) and not callable(member):
            raise TypeError(
                f"loss_type: expected names or callables in a list, got {type(member).__name__}"
            )
    return tuple(loss_type)


def check_loss_weights(weights) -> tuple[float, ...] | None:
    if weights is None:
        return None
    if not isinstance(weights, list | tuple):
        raise TypeError(f"loss_weights: expected a list of numbers, got {type(weights).__name__}")
    return tuple(check_finite(f"loss_weights[{i}]", weight) for i, weight in enumerate(weights))


def check_ignore_index(ignore_index: int) -> int:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, numbers.Integral):
        raise TypeError(f"ignore_index: expected an integer, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(
            "ignore_index: expected a value that a label can have, -2**63 to 2**63 - 1, "
            f"got {ignore_index}"
        )
    return int(ignore_index)


def check_ld_alpha(ld_alpha: float | None) -> float | None:
    if ld_alpha is None:
        return None
    if not 0 <= check_number("ld_alpha", ld_alpha) <= 1:
        raise ValueError(f"ld_alpha: expected 0 <= ld_alpha <= 1, got {ld_alpha}")
    return float(ld_alpha)


def check_temperature(temperature: float) -> float:
    return check_positive("temperature", temperature)


def check_reduction(reduction: str) -> None:
    check_choice("reduction", reduction, REDUCTIONS)


def check_sequence_logps(name: str, x, pairs: int, device: torch.device) -> None:
    check_plain(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating point tensor, got {x.dtype}")
    if x.shape != (pairs,):
        raise ValueError(f"{name}: expected one log-prob a pair, [{pairs}], got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected on {device}, got {x.device}")
    if validates() and x.isnan().any():
        pair = int(x.isnan().nonzero()[0])
        raise ValueError(f"{name}[{pair}]: expected a log-prob, got nan")


def check_pair_tensor(name: str, x, shape: torch.Size) -> None:
    """What preference_loss is given, in plain PyTorch: log-probs of pairs."""
    check_dense(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating point tensor, got {x.dtype}")
    if x.dim() != 1 or x.shape != shape:
        raise ValueError(
            f"{name}: expected one log-prob a pair, {list(shape)}, got {list(x.shape)}"
        )


def check_lengths(name: str, x, shape: torch.Size) -> None:
    """Numbers of scored tokens; their values on a CPU, elsewhere where values are validated."""
    check_dense(name, x)
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected numbers of tokens, got {x.dtype}")
    if x.shape != shape:
        raise ValueError(
            f"{name}: expected {list(shape)} like policy_chosen_logps, got {list(x.shape)}"
        )
    looks = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if (looks or validates()) and transform_of(x) is None and not (x >= 0).all():
        raise ValueError(f"{name}: expected numbers of tokens, 0 or more, got {x.min().item()}")


def check_inplace(logits: Tensor) -> None:
    """In place, every logit needs memory of its own."""
    reach = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(
                "inplace_backward: the logits are an expanded or overlapping tensor that shares "
                f"memory, strides {list(logits.stride())} of {list(logits.shape)}"
            )
        reach += stride * max(size - 1, 0)
