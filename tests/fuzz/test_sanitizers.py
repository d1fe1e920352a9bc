"""The CPU kernels under ASan and UBSan: the instrumentation is there, and finds nothing."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.fuzz import sanitized

pytestmark = pytest.mark.skipif(
    not shutil.which(sanitized.compiler()) or not sanitized.runtimes("address"),
    reason="needs a compiler with AddressSanitizer",
)

# 4 rows are claimed of memory that holds 2
READS_BEYOND = """
import tests.fuzz.sanitized
import numpy as np, torch
import dpo_kernels as dk
memory = np.zeros((2, 3000), dtype=np.float32)
claimed = np.lib.stride_tricks.as_strided(memory, (4, 3000))
logits = torch.from_numpy(claimed)
labels = torch.zeros(4, dtype=torch.int64)
print("before", flush=True)
dk.token_logps(logits{rows}, labels{rows}, backend="cpu")
print("after", flush=True)
"""

# the kernels' own threads work on one problem; with {shared} another thread of Python reads what
# they overwrite
OVERWRITES = """
import tests.fuzz.sanitized
import threading, torch
import dpo_kernels as dk
torch.set_num_threads(4)
labels = torch.randint(20_000, (4, 16))
logits = torch.randn(4, 16, 20_000, requires_grad=True) * 1
loss = dk.dpo_loss(logits, labels, reference_free=True, inplace_backward=True, backend="cpu").loss
read = logits.detach() if {shared} else torch.randn(4, 16, 20_000)
thread = threading.Thread(target=lambda: [dk.token_logps(read, labels) for _ in range(20)])
thread.start()
loss.backward()
thread.join()
print("after", flush=True)
"""


def run(code: str, kind: str = "address") -> subprocess.CompletedProcess:
    environment = {**os.environ, **sanitized.environment(kind)}
    return subprocess.run(
        [*sanitized.command(kind), "-c", code],
        env=environment,
        cwd=sanitized.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_asan_sees_a_read_beyond_the_end():
    """Proof that the kernels that run are the instrumented ones."""
    done = run(READS_BEYOND.format(rows=""))
    assert done.stdout == "before\n"
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    inside = run(READS_BEYOND.format(rows="[:2]"))
    assert inside.stdout == "before\nafter\n" and inside.returncode == 0, inside.stderr


def test_fuzzing_under_asan_and_ubsan():
    """A few examples of every property; python -m tests.fuzz --sanitize address runs more."""
    command = [*sanitized.command("address"), "-m", "tests.fuzz", "--sanitize", "address"]
    done = subprocess.run(
        [*command, "--minutes", "0", "--examples", "8", "--seed", "1", "-k", "bits or tokens"],
        cwd=sanitized.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runtime error" not in done.stdout + done.stderr


@pytest.mark.skipif(
    not shutil.which("setarch") or not sanitized.runtimes("thread"),
    reason="needs a compiler with ThreadSanitizer, and setarch",
)
def test_tsan_sees_a_race_and_none_of_ours():
    raced = run(OVERWRITES.format(shared=True), "thread")
    assert "ThreadSanitizer: data race" in raced.stderr and raced.stdout == ""
    ours = run(OVERWRITES.format(shared=False), "thread")
    assert ours.stdout == "after\n" and "ThreadSanitizer" not in ours.stderr, ours.stderr
