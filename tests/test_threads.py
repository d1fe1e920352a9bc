"""The CPU kernels' threads: any number of them, in any process, called from any thread."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dpo_kernels.backends import cpu
from tests.entries import assert_all_same_bits, loss_of, results
from tests.helpers import CPU, assert_same_bits, make_problem
from tests.test_parity import gradient


@pytest.fixture(params=("openmp", "own"))
def workers(request):
    """Whose threads the CPU kernels work on: those of torch's OpenMP runtime, or their own."""
    if request.param == "openmp" and not cpu.openmp_parallel():
        pytest.skip("this torch brings no GNU OpenMP runtime along")
    cpu.MODULE.cpu_share_openmp(cpu.openmp_parallel() if request.param == "openmp" else 0)
    yield request.param
    cpu.MODULE.cpu_share_openmp(cpu.openmp_parallel())


# 1 and 2 scored rows of 200000 classes are split over the threads, 40 of 500 are not
@pytest.mark.parametrize(("length", "vocab"), ((1, 200_000), (2, 33_000), (20, 500)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_same_bits_for_any_number_of_threads(threads, workers, length, vocab, dtype):
    problem = make_problem(CPU, dtype, pairs=1, length=length, vocab=vocab, scored=1.0, seed=23)
    expected = None
    for count in (1, 2, 3, 7):
        threads(count)
        values = results(problem, "cpu", shift=False)
        expected = expected or values
        assert_all_same_bits(values, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_fork(threads, workers, monkeypatch):
    """A child of a process that has used the kernels' threads can use them too."""
    # poisoning fills memory with torch's own threads, which do not survive a fork
    monkeypatch.undo()
    threads(2)
    problem = make_problem(length=40, vocab=3000, seed=25)
    loss = loss_of(problem, "cpu").loss
    expected = gradient(problem, loss)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # a deadlock ends here
            signal.alarm(20)
            out = loss_of(problem, "cpu")
            # numpy's comparison, for the same reason
            same = (gradient(problem, out.loss).numpy() == expected.numpy()).all()
            os.write(write, b"1" if same and out.loss.item() == loss.item() else b"0")
        finally:
            os._exit(0)
    os.close(write)
    answer = os.read(read, 1)
    os.waitpid(child, 0)
    os.close(read)
    assert answer == b"1"
    assert_same_bits(gradient(problem, loss_of(problem, "cpu").loss), expected)


def test_several_python_threads(threads, workers):
    """The GIL is released, so calls overlap: each gives the bits it gives alone."""
    threads(2)
    # large enough that each call is worth two threads
    problems = [make_problem(length=8 + n, vocab=20_000 + n, seed=n) for n in range(8)]
    expected = [results(p, "cpu") for p in problems]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(results, p, "cpu") for p in problems * 3]
            for future, wanted in zip(futures, expected * 3, strict=True):
                assert_all_same_bits(future.result(timeout=60), wanted)
    finally:
        sys.setswitchinterval(interval)


def test_logits_of_another_thread_survive_until_backward():
    """A huge-page gradient outlives the call that made it."""
    problem = make_problem(length=16, vocab=40_000, seed=26)
    grads = [gradient(problem, loss_of(problem, "cpu").loss) for _ in range(3)]
    assert len({g.data_ptr() for g in grads}) == 3
    kept = grads.pop().clone()
    assert_same_bits(grads[0], kept)
    # the memory is the tensor's own, writable
    grads[0].mul_(2.0)
    assert_same_bits(grads[0], 2 * kept)
    assert_same_bits(grads[1], kept)
