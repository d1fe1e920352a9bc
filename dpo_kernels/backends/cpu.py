"""The C++ CPU kernels: torch tensors to raw pointers."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from . import gradient_memory
from .batch import ForwardOutputs, GradOutput, PairLoss, TokenBatch
from .native import (
    MODULE,
    load_error,
    native_backward,
    native_batch,
    native_outputs,
    native_pair_loss,
)

CHECKS_LABELS = True
CASTS_GRADIENT = False

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def openmp_parallel() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch brings along; 0: it brings none."""
    folder = Path(torch.__file__).parent
    for path in (*folder.glob("lib/libgomp*.so*"), *folder.glob("../torch.libs/libgomp*.so*")):
        # loaded already: this is the runtime of torch's own operators
        function = ctypes.CDLL(str(path)).GOMP_parallel
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


if MODULE is not None:
    MODULE.cpu_share_openmp(openmp_parallel())


def unavailable() -> str | None:
    return load_error()


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it runs on CPU tensors, got a tensor on {device.type}"
    if dtype not in _DTYPES:
        return f"it takes float32, bfloat16, float16 and float64, got {dtype}"
    return None


def empty_gradient(batch: TokenBatch) -> tuple[Tensor, bool]:
    """Memory for a gradient, and whether it holds zeros already."""
    return gradient_memory.empty(batch.logits.shape, batch.logits.dtype)


def forward(batch: TokenBatch, pair: PairLoss | None, out: ForwardOutputs) -> int:
    native = native_batch(batch)
    return MODULE.cpu_forward(
        native, native_pair_loss(pair), native_outputs(native, out), torch.get_num_threads()
    )


def backward(
    batch: TokenBatch,
    tokens: Tensor,
    grad_output: GradOutput,
    grad_logits: Tensor,
    zero_unscored: bool,
) -> int:
    native = native_batch(batch)
    return MODULE.cpu_backward(
        native,
        native_backward(native, tokens, grad_output, grad_logits, zero_unscored),
        torch.get_num_threads(),
    )
