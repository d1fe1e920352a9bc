"""backends/cuda.py with the compiled module and torch.cuda replaced: what it asks of both."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from dpo_kernels.backends import cuda, native
from dpo_kernels.backends.batch import ForwardOutputs, TokenBatch


class Module:
    """Answers for two GPUs: the kernels run on cuda:0, and cuda:1 is too old for them."""

    cuda_archs = "80;90"

    def __init__(self):
        self.asked = []

    def cuda_device_problem(self, index: int) -> str:
        self.asked.append(index)
        return "" if index == 0 else "cudaErrorNoKernelImageForDevice"

    def cuda_workspace_bytes(self, batch) -> int:
        return 4096

    def cuda_forward(self, batch, pair, out, workspace: int, device: int, stream: int):
        assert workspace % 16 == 0


@pytest.fixture
def module(monkeypatch) -> Module:
    module = Module()
    cuda._device_problem.cache_clear()
    monkeypatch.setattr(cuda, "MODULE", module)
    monkeypatch.setattr(cuda, "load_error", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9 - 2 * index, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
    yield module
    cuda._device_problem.cache_clear()


def test_each_gpu_is_asked_once_and_answers_for_itself(module):
    for _ in range(3):
        assert cuda.unavailable() is None
        assert cuda.refuses(torch.device("cuda:0"), torch.bfloat16) is None
        reason = cuda.refuses(torch.device("cuda:1"), torch.bfloat16)
    assert "cuda:1 is sm_70" in reason and "sm_80, sm_90" in reason
    assert "cudaErrorNoKernelImageForDevice" in reason
    # without an index it is the current one
    assert cuda.refuses(torch.device("cuda"), torch.bfloat16) == reason
    assert sorted(module.asked) == [0, 1]


def test_unavailable_when_no_gpu_can(module, monkeypatch):
    monkeypatch.setattr(module, "cuda_device_problem", lambda index: "too old")
    assert "cuda:0" in cuda.unavailable() and "too old" in cuda.unavailable()


def test_the_compiled_module_says_why_it_cannot_run():
    if not native.MODULE or not native.MODULE.cuda_archs:
        pytest.skip("the package was built without nvcc")
    problem = native.MODULE.cuda_device_problem(4096)
    assert "cudaError" in problem and "compiled by CUDA" in problem


def test_nothing_allocated_in_a_call_outlives_it(module, monkeypatch):
    """A CUDA graph would replay into memory that is freed, or shared with another call."""
    monkeypatch.setattr(cuda, "native_batch", lambda batch: None)
    monkeypatch.setattr(cuda, "native_outputs", lambda batch, out: None)
    made = []
    empty, zeros = torch.empty, torch.zeros

    def remember(make):
        def allocate(*args, device=None, **options):
            tensor = make(*args, **options)
            made.append(weakref.ref(tensor))
            return tensor

        return allocate

    logits = SimpleNamespace(device=torch.device("cuda:0"))
    batch = TokenBatch(logits, torch.zeros(2, 3), None, -100, True)
    out = ForwardOutputs(empty(3, 6), None, None, None, None, None, None, False)
    monkeypatch.setattr(torch, "empty", remember(empty))
    monkeypatch.setattr(torch, "zeros", remember(zeros))
    cuda.forward(batch, None, out)
    gc.collect()
    assert made and all(tensor() is None for tensor in made)
