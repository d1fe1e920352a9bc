"""The executors of the test session: one a backend, with the findings and the coverage of all."""

from __future__ import annotations

import contextlib
import os

import pytest

ARCHS = (80, 90, 100, 120)
_executors: dict[str, object] = {}


def arch() -> int:
    """DPO_KERNELS_PTX_ARCH, sm_90 if it is not set."""
    return int(os.environ.get("DPO_KERNELS_PTX_ARCH", "90"))


def everything() -> bool:
    """DPO_KERNELS_PTX=all: every test of a target on PTX, not only some of each function."""
    return os.environ.get("DPO_KERNELS_PTX") == "all"


def choose(items) -> None:
    """Of each test function the first and the last case a backend, unless all are wanted."""
    if everything():
        return
    cases: dict[tuple, list] = {}
    for item in items:
        target = getattr(item, "callspec", None) and item.callspec.params.get("target")
        if getattr(target, "executor", "") == "ptx":
            function = item.nodeid.split("[")[0]
            cases.setdefault((function, target.backend), []).append(item)
    skip = pytest.mark.skip(reason="make test-ptx runs it")
    for same in cases.values():
        for item in same[1:-1]:
            item.add_marker(skip)


def executor(backend: str):
    if backend not in _executors:
        if backend == "cuda":
            from .cuda import CudaExecutor as Made
        else:
            from .triton import TritonExecutor as Made
        _executors[backend] = Made(arch())
    return _executors[backend]


@contextlib.contextmanager
def running(backend: str):
    """The backend serves CPU tensors by executing its PTX; what the checks find fails the test."""
    own = executor(backend)
    reason = own.unavailable()
    if reason is not None:
        pytest.skip(f"{backend} on PTX: {reason}")
    before = dict(own.findings)
    with own.active():
        yield own
    new = [f"{kind}: {text}" for kind, text in own.findings if (kind, text) not in before]
    assert not new, "\n".join(new)


def report() -> list[str]:
    """A line a kernel: launches, instructions, share of its instructions that ran."""
    lines = []
    for backend, own in _executors.items():
        lines.append(
            f"{backend} on PTX of sm_{own.arch}: {own.launches} launches, {own.executed} steps, "
            f"{own.seconds:.0f} s, {len(own.programs)} compilations"
        )
        for name, (done, every) in own.coverage().items():
            lines.append(f"  {done / every:5.0%} of {every} instructions: {name}")
    return lines
