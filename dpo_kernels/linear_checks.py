"""Validation of a language model head: what cannot be read as one dense matrix is refused."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .checks import check_floating, check_number

PRECISIONS = ("exact", "fast")


def check_hidden(name: str, hidden) -> None:
    check_floating(name, hidden)
    if hidden.dim() < 2 or hidden.shape[-1] == 0:
        raise ValueError(f"{name}: expected [..., rows, hidden size], got {list(hidden.shape)}")


def check_weight(name: str, weight) -> None:
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
    if type(weight).__name__ == "DTensor":
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor; pass {name}.full_tensor(), or call "
            "inside the unsharded module"
        )
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


def check_head(hidden, weight, bias, prefix: str) -> torch.dtype:
    """The dtype of the head's GEMMs."""
    names = [prefix + name for name in ("hidden", "weight", "bias")]
    check_hidden(names[0], hidden)
    check_weight(names[1], weight)
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{names[1]}: expected [vocabulary, {hidden.shape[-1]}] for {names[0]} "
            f"{list(hidden.shape)}, got {list(weight.shape)}"
        )
    if bias is not None:
        check_floating(names[2], bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{names[2]}: expected [{weight.shape[0]}], the vocabulary, got {list(bias.shape)}"
            )
    for name, x in zip(names[1:], (weight, bias), strict=True):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name}: expected on {hidden.device} like {names[0]}, got {x.device}")
    return _gemm_dtype(names, hidden, weight, bias)


def _gemm_dtype(names: list[str], hidden: Tensor, weight: Tensor, bias) -> torch.dtype:
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


def check_precision(precision: str) -> str:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
    return precision


def check_softcap(softcap: float | None) -> float:
    """0 where there is none, as the kernels take it."""
    if softcap is None:
        return 0.0
    if not 0 < check_number("logit_softcap", softcap) < math.inf:
        raise ValueError(f"logit_softcap: expected a positive number or None, got {softcap}")
    return float(softcap)


def check_scale(scale: float) -> float:
    if not -math.inf < check_number("logit_scale", scale) < math.inf:
        raise ValueError(f"logit_scale: expected a finite number, got {scale}")
    return float(scale)


def check_workspace(workspace_mb: float | None) -> int:
    """Bytes; 0 for the default."""
    if workspace_mb is None:
        return 0
    if not 0 < check_number("workspace_mb", workspace_mb) < math.inf:
        raise ValueError(f"workspace_mb: expected a positive number of MiB, got {workspace_mb}")
    return max(int(workspace_mb * 2**20), 1)
