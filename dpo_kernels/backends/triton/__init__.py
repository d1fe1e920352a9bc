"""The Triton kernels: NVIDIA and AMD GPUs, and CPU tensors under Triton's interpreter.

Nothing here imports Triton before it is asked for.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ...compat import triton_unsuitable
from ..batch import ForwardOutputs, GradOutput, PairLoss, TokenBatch

CHECKS_LABELS = False
CASTS_GRADIENT = True

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    reason = triton_unsuitable()
    if reason is not None:
        return reason
    if not torch.cuda.is_available() and not _interpreted():
        return "no GPU is visible to torch, and TRITON_INTERPRET is not 1"
    return None


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "float64 runs on the cpu and torch backends"
    if dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, got {dtype}"
    if device.type == "cuda" or (device.type == "cpu" and _interpreted()):
        return None
    return f"it runs on GPU tensors, got a tensor on {device.type}"


def empty_gradient(batch: TokenBatch) -> tuple[Tensor, bool]:
    logits = batch.logits
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device), False


def forward(batch: TokenBatch, pair: PairLoss | None, out: ForwardOutputs) -> int:
    from .launch import launch_forward

    launch_forward(batch, pair, out)
    return -1


def backward(
    batch: TokenBatch,
    tokens: Tensor,
    grad_output: GradOutput,
    grad_logits: Tensor,
    zero_unscored: bool,
) -> int:
    from .launch import launch_backward

    launch_backward(batch, tokens, grad_output, grad_logits, zero_unscored)
    return -1
