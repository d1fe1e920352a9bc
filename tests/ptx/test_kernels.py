"""All 22 CUDA kernels run: each dtype and gradient, with and without statistics and a softcap."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from . import targets
from .calls import Call, check, problem, sliced

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# share of a kernel's instructions that run here at least once; counted 91 to 97%. What is left:
# loops unrolled for more sequences or spans than a case has, offsets beyond 2^31, and branches
# around what has to be done.
LEAST_COVERAGE = 0.9
# instructions of two loops that nvcc makes apart for a batch without tokens from sm_100 on: there
# the outputs of statistics are null, and the kernel with statistics does not run
WITHOUT_TOKENS = 2 * 220


def calls(dtype, softcap: float) -> Iterator[Call]:
    """Short and odd rows, rows of several spans, aligned and not, packed, and extreme logits; every
    index of a gradient, padded and packed; a shard; and tokens outside of all sequences."""
    starts = (0, 3, 9, 14, 20)
    yield Call(problem(dtype, 7, softcap))
    yield Call(problem(dtype, 2059, softcap))
    yield Call(problem(dtype, 6144, softcap))
    yield Call(problem(dtype, 4099, softcap, packed=starts))
    yield Call(problem(dtype, 1004, softcap, scale=-1.0))
    yield Call(sliced(problem(dtype, 2200, softcap, shape=(2, 3))))
    for packed in ((), starts):
        yield Call(problem(dtype, 8, softcap, packed=packed), "token")
        yield Call(problem(dtype, 8, softcap, packed=packed), "sequence", average=True)
    yield Call(problem(dtype, 7, softcap, vocab_start=1, vocab_total=9), "token")
    inside = problem(dtype, 7, softcap, packed=(0, 3, 3, 14, 19))
    yield Call(inside, average=True, referenced=False, zero_unscored=False)
    if softcap == 0:
        # exponents far beyond what a float32 resolves to 1, and logits that are -inf
        extreme = problem(dtype, 2059, softcap)
        extreme.logits[:2] *= torch.finfo(dtype).max / 64
        extreme.logits[2:, :, ::3] = -torch.inf
        yield Call(replace(extreme, labels=torch.where(extreme.labels < 0, -100, 1)))


def long_calls(dtype, softcap: float) -> Iterator[Call]:
    """As many rows as give a lane several labels to count, and warps several spans at once; more
    sequences than warps; no tokens at all. Nothing in backward depends on them."""
    for packed in ((), (0, 9100, 18400)):
        batch = problem(dtype, 3, softcap, shape=(2, 9200), scored=0.025, packed=packed)
        yield Call(batch, backward=False)
    yield Call(problem(dtype, 3, softcap, shape=(140, 2)), backward=False)
    for packed in ((), (0, 0, 0)):
        empty = problem(dtype, 3, softcap, shape=(2, 0), packed=packed)
        yield Call(empty, backward=False)


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_kernel(dtype, stats, softcap):
    for call in (*calls(dtype, softcap), *long_calls(dtype, softcap)):
        # backward is the same kernel with statistics, and reads none of them
        check("cuda", replace(call, backward=call.backward and not stats), stats, dtype)


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("grad_dtype", DTYPES[1:], ids=str)
def test_cuda_gradient_of_another_dtype(grad_dtype, softcap):
    for call in calls(torch.float32, softcap):
        check("cuda", call, False, grad_dtype)


def test_cuda_coverage():
    """After the tests above, which run in this process."""
    executor = targets.executor("cuda")
    covered = executor.coverage()
    if len(covered) < 22:
        pytest.skip(f"only {len(covered)} of 22 kernels were run")
    low = {}
    for name, (done, every) in covered.items():
        if executor.arch >= 100 and re.search(r"forward_kernel\w+?Lb1ELb[01]E", name):
            every -= WITHOUT_TOKENS
        if done < LEAST_COVERAGE * every:
            low[name] = f"{done / every:.0%}"
    assert low == {}
