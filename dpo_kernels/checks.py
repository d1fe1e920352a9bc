"""Validation of what users pass: shapes, dtypes and devices, before anything runs.

Values (labels, cu_seqlens) are checked where real tensors are at hand, in ops.py.
"""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")


def check_floating(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if type(x).__name__ == "DTensor":
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor; pass {name}.full_tensor()"
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")


def check_labels(labels, shape: torch.Size, device: torch.device, owner: str) -> Tensor:
    """labels as int64; ``shape`` is what they must have, ``owner`` the argument it comes from."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected an integer dtype, got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(
            f"labels: expected {list(shape)}, like {owner} without its last dimension, "
            f"got {list(labels.shape)}"
        )
    if labels.device != device:
        raise ValueError(f"labels: expected on {device} like {owner}, got {labels.device}")
    return labels if labels.dtype == torch.int64 else labels.to(torch.int64)


def check_cu_seqlens(cu_seqlens, dims: int, device: torch.device, owner: str) -> Tensor | None:
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: expected a tensor, got {type(cu_seqlens).__name__}")
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
    return cu_seqlens.to(torch.int64).contiguous()


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
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def check_ignore_index(ignore_index: int) -> int:
    if not isinstance(ignore_index, numbers.Integral):
        raise TypeError(f"ignore_index: expected an integer, got {type(ignore_index).__name__}")
    return int(ignore_index)


def check_ld_alpha(ld_alpha: float | None) -> float | None:
    if ld_alpha is None:
        return None
    if not 0 <= check_number("ld_alpha", ld_alpha) <= 1:
        raise ValueError(f"ld_alpha: expected 0 <= ld_alpha <= 1, got {ld_alpha}")
    return float(ld_alpha)


def check_temperature(temperature: float) -> float:
    check_number("temperature", temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    return float(temperature)


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r} is not one of {', '.join(REDUCTIONS)}")


def check_sequence_logps(name: str, x, pairs: int, device: torch.device) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a floating point tensor, got {got}")
    if x.shape != (pairs,):
        raise ValueError(f"{name}: expected one log-prob a pair, [{pairs}], got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected on {device}, got {x.device}")


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
