"""Where tests run: every backend on every device it has, with uninitialised memory poisoned."""

from __future__ import annotations

import os
import sys

import pytest
import torch

# the interpreter is chosen when a kernel is decorated, so before dpo_kernels' triton is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from dpo_kernels.cli import caches
from dpo_kernels.dispatch import available_backends
from tests import triton_interpreter
from tests.helpers import Target
from tests.ptx import targets as ptx_targets

# files of long tests: begun first where several processes take files in turn, lest one of them be
# left with the other idle. The first two share nothing that has to be compiled.
LONGEST = (
    *("test_kernels.py", "test_triton_compile.py", "test_sanitizers.py", "test_readme.py"),
    *("test_demo.py", "test_mutations.py", "test_parity.py", "test_cuda_simt.py"),
    *("test_cuda_compile.py", "test_cuda_sanitizers.py", "test_benchmarks.py", "test_linear.py"),
    *("test_cpu_sanitizers.py", "test_triton_kernels.py"),
)

_gpu = pytest.mark.gpu
TARGETS = [
    pytest.param(Target("cpu", "cpu"), id="cpu"),
    pytest.param(Target("torch", "cpu"), id="torch"),
    pytest.param(Target("triton", "cpu"), id="triton-interpreter"),
    pytest.param(Target("cuda", "cpu", "ptx"), id="cuda-ptx"),
    pytest.param(Target("triton", "cpu", "ptx"), id="triton-ptx"),
    pytest.param(Target("cuda", "cuda"), id="cuda-gpu", marks=_gpu),
    pytest.param(Target("triton", "cuda"), id="triton-gpu", marks=_gpu),
    pytest.param(Target("torch", "cuda"), id="torch-gpu", marks=_gpu),
]


def pytest_configure(config):
    caches.keep_apart()
    if os.environ.get("TRITON_INTERPRET") == "1":
        triton_interpreter.patch_once()
    # numpy warns of the NaN and infinities that tests feed to Triton's interpreter
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    of_sums = "ignore:(overflow|invalid value) encountered in reduce:RuntimeWarning"
    config.addinivalue_line("filterwarnings", of_sums)


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        # of those with a rank the first comes first; sort() keeps the order of the rest
        rank = {name: at for at, name in enumerate(reversed(LONGEST), 1)}
        items.sort(key=lambda item: -rank.get(item.path.name, 0))
    ptx_targets.choose(items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA GPU is visible to torch")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(params=TARGETS)
def target(request) -> Target:
    """A backend and a device; skipped, with the reason, where the backend cannot run."""
    wanted = request.param
    if wanted.executor == "ptx":
        with ptx_targets.running(wanted.backend):
            yield wanted
        return
    reason = available_backends()[wanted.backend]
    if wanted == Target("triton", "cpu") and os.environ.get("TRITON_INTERPRET") != "1":
        reason = "Triton runs on the GPU here, not in its interpreter"
    if reason is not None:
        pytest.skip(f"{wanted.backend}: {reason}")
    yield wanted


def pytest_terminal_summary(terminalreporter):
    for line in ptx_targets.report():
        terminalreporter.write_line(line)


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) is not torch.Tensor or tensor.device.type == "meta":
        return tensor
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max // 2)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory that dpo_kernels allocates uninitialised holds NaN: an element nobody wrote shows."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return _poison(tensor) if caller.startswith("dpo_kernels") else tensor

        return wrapper

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
