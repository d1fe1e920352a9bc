"""The CUDA C++ kernels: torch tensors to raw pointers, a stream and a workspace."""

from __future__ import annotations

import torch
from torch import Tensor

from ..build_record import why_no_cuda
from .batch import ForwardOutputs, PairLoss, TokenBatch, Upstream
from .boundary import check_backward, check_forward
from .native import (
    MODULE,
    load_error,
    native_backward,
    native_batch,
    native_outputs,
    native_pair_loss,
)

CHECKS_LABELS = False

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# by device and stream: kernels on two streams must not share counters
_workspaces: dict[tuple[int, int], Tensor] = {}


def unavailable() -> str | None:
    if load_error() is not None:
        return load_error()
    if not MODULE.cuda_archs:
        return why_no_cuda()
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible to torch"
    return None


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it runs on CUDA tensors, got a tensor on {device.type}"
    if dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, got {dtype}"
    return None


def empty_gradient(batch: TokenBatch) -> tuple[Tensor, bool]:
    return torch.empty(
        batch.logits.shape, dtype=batch.logits.dtype, device=batch.logits.device
    ), False


def _workspace(native, device: int, stream: int) -> Tensor:
    """Zeroed memory; every launch leaves it zeroed, so it is made once and grows when it must."""
    needed = MODULE.cuda_workspace_bytes(native, device)
    held = _workspaces.get((device, stream))
    if held is None or held.numel() < needed:
        held = torch.zeros(max(needed, 1 << 16), dtype=torch.uint8, device=f"cuda:{device}")
        # a graph that is being captured owns what it allocates
        if not torch.cuda.is_current_stream_capturing():
            _workspaces[device, stream] = held
    return held


def forward(batch: TokenBatch, pair: PairLoss | None, out: ForwardOutputs) -> int:
    check_forward(batch, pair, out)
    device = batch.logits.device.index
    stream = torch.cuda.current_stream(device).cuda_stream
    native = native_batch(batch)
    workspace = _workspace(native, device, stream)
    MODULE.cuda_forward(
        native,
        native_pair_loss(pair),
        native_outputs(native, out),
        workspace.data_ptr(),
        device,
        stream,
    )
    return -1


def backward(
    batch: TokenBatch, tokens: Tensor, upstream: Upstream, grad_logits: Tensor, zero_unscored: bool
) -> int:
    check_backward(batch, tokens, upstream, grad_logits)
    device = batch.logits.device.index
    native = native_batch(batch)
    MODULE.cuda_backward(
        native,
        native_backward(native, tokens, upstream, grad_logits, zero_unscored),
        device,
        torch.cuda.current_stream(device).cuda_stream,
    )
    return -1
