"""The CUDA C++ kernels: torch tensors to raw pointers, a stream and a workspace."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..build_record import why_no_cuda
from .batch import ForwardOutputs, GradOutput, PairLoss, TokenBatch
from .native import (
    MODULE,
    load_error,
    native_backward,
    native_batch,
    native_outputs,
    native_pair_loss,
)

CHECKS_LABELS = False
CASTS_GRADIENT = True

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    if load_error() is not None:
        return load_error()
    if not MODULE.cuda_archs:
        return why_no_cuda()
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible to torch"
    problems = [_device_problem(index) for index in range(torch.cuda.device_count())]
    return None if None in problems else problems[0]


@functools.cache
def _device_problem(index: int) -> str | None:
    """None, or why the compiled kernels cannot run on this GPU."""
    problem = MODULE.cuda_device_problem(index)
    if not problem:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    built = ", ".join(f"sm_{arch}" for arch in MODULE.cuda_archs.split(";"))
    return f"cuda:{index} is sm_{major}{minor}, the kernels were built for {built}: {problem}"


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it runs on CUDA tensors, got a tensor on {device.type}"
    if dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, got {dtype}"
    return _device_problem(torch.cuda.current_device() if device.index is None else device.index)


def empty_gradient(batch: TokenBatch) -> tuple[Tensor, bool]:
    return torch.empty(
        batch.logits.shape, dtype=batch.logits.dtype, device=batch.logits.device
    ), False


def forward(batch: TokenBatch, pair: PairLoss | None, out: ForwardOutputs) -> int:
    device = batch.logits.device.index
    stream = torch.cuda.current_stream(device).cuda_stream
    native = native_batch(batch)
    # freed as the call returns: the allocator gives it to no other stream before the kernel is done
    workspace = torch.empty(
        MODULE.cuda_workspace_bytes(native), dtype=torch.uint8, device=batch.logits.device
    )
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
    batch: TokenBatch,
    tokens: Tensor,
    grad_output: GradOutput,
    grad_logits: Tensor,
    zero_unscored: bool,
) -> int:
    device = batch.logits.device.index
    native = native_batch(batch)
    MODULE.cuda_backward(
        native,
        native_backward(native, tokens, grad_output, grad_logits, zero_unscored),
        device,
        torch.cuda.current_stream(device).cuda_stream,
    )
    return -1
