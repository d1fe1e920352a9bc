"""What linear_dpo_loss takes beside its inputs: the workspace, O(N D) and the gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

# what the libraries' threads allocate at once depends on what else the cores do
pytestmark = pytest.mark.alone

ROWS, SIZE, VOCAB = 4096, 128, 49152
MIB = 1 << 20
# libraries, threads and allocators keep some memory of their own
SLACK = 64 * MIB

# a process of its own: freed memory that an allocator holds back would hide what a call takes
PROGRAM = """
import json, sys
import torch
import dpo_kernels as dk

device, dtype, frozen, workspace_mb, rows, size, vocab = json.loads(sys.argv[1])
dtype = getattr(torch, dtype)

def peak_above(baseline):
    if device == "cuda":
        return torch.cuda.max_memory_allocated() - baseline
    with open("/proc/self/status") as lines:
        status = dict(line.split(":", 1) for line in lines)
    return (int(status["VmHWM"].split()[0]) << 10) - baseline

def baseline():
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    with open("/proc/self/status") as lines:
        status = dict(line.split(":", 1) for line in lines)
    return int(status["VmRSS"].split()[0]) << 10

def step(rows, vocab):
    hidden = torch.randn(8, rows // 8, size, device=device).to(dtype).requires_grad_()
    weight = torch.randn(vocab, size, device=device).to(dtype).requires_grad_(not frozen)
    labels = torch.randint(vocab, (8, rows // 8), device=device)
    reference = torch.randn_like(hidden)
    before = baseline()
    out = dk.linear_dpo_loss(
        hidden, weight, labels, reference_hidden=reference, workspace_mb=workspace_mb
    )
    out.loss.backward()
    return peak_above(before)

step(64, 512)
print(step(rows, vocab))
"""


@pytest.mark.parametrize("workspace_mb", [64, 256])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_peak_is_within_the_promise(device, dtype, frozen, workspace_mb):
    if device == "cpu" and not sys.platform.startswith("linux"):
        pytest.skip("peak memory is read from /proc")
    arguments = json.dumps([device, dtype, frozen, workspace_mb, ROWS, SIZE, VOCAB])
    command = [sys.executable, "-c", PROGRAM, arguments]
    # from its first large block on, glibc would keep freed ones of up to 32 MiB: how many is chance
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    peak = int(result.stdout)
    item = getattr(torch, dtype).itemsize
    # dhidden as it is made and as it is returned, and its parts in float32
    rows = ROWS * SIZE * (2 * item + 8)
    # dweight in float32, what it is kept in until the backward, and what that returns
    weight = 0 if frozen else VOCAB * SIZE * (4 + 2 * item)
    bound = workspace_mb * MIB + rows + weight + SLACK
    assert peak < bound, f"{peak / MIB:.0f} MiB, promised {bound / MIB:.0f}"
    # the logits alone would take eight times the larger workspace
    assert bound < ROWS * VOCAB * 4
