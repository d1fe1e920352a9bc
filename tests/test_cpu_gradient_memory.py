"""Memory of large gradients: kept while a tensor lives, reused after, given back on demand."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import resource
import subprocess
import sys
import threading
import weakref

import pytest
import torch

import dpo_kernels
from dpo_kernels.backends import gradient_memory

from .helpers import make_problem

SHAPE = torch.Size((3, 1 << 20))
BYTES = 12 << 20

pytestmark = pytest.mark.skipif(
    not gradient_memory._SUPPORTED, reason="no MADV_FREE and MADV_HUGEPAGE on this platform"
)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setenv("DPO_KERNELS_GRADIENT_POOL_MB", "256")
    gc.collect()
    gradient_memory.release()
    yield
    gradient_memory.release()


def make(shape=SHAPE, dtype=torch.float32):
    return gradient_memory.empty(torch.Size(shape), dtype)


def test_freed_memory_is_reused_and_known_to_hold_no_zeros():
    first, zeroed = make()
    assert zeroed and not first.any()
    address = first.fill_(3.0).data_ptr()
    del first
    assert BYTES <= gradient_memory.idle_bytes() <= 1.25 * BYTES + (2 << 20)
    second, zeroed = make()
    assert not zeroed and second.data_ptr() == address
    assert gradient_memory.idle_bytes() == 0


@pytest.mark.parametrize(
    "keep",
    (
        lambda tensor: tensor[1],
        lambda tensor: tensor.view(-1)[-1:],
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.detach(),
        lambda tensor: torch.utils.dlpack.to_dlpack(tensor),
    ),
    ids=("row", "last element", "storage", "numpy", "detached", "dlpack"),
)
def test_whatever_looks_at_the_memory_keeps_it(keep):
    kept = keep(make()[0])
    gc.collect()
    assert gradient_memory.idle_bytes() == 0
    del kept
    gc.collect()
    assert gradient_memory.idle_bytes() > 0


def test_masked_rows_are_zero_in_reused_memory():
    problem = make_problem(pairs=2, length=16, vocab=70_001, scored=1.0)
    labels = [problem.labels.clone() for _ in range(3)]
    labels[1][:, ::2] = -100
    labels[2][1] = -100
    addresses = set()
    for each in labels:
        out = dpo_kernels.dpo_loss(
            problem.logits, each, *problem.reference, shift=False, backend="cpu"
        )
        (grad,) = torch.autograd.grad(out.loss, problem.logits)
        addresses.add(grad.data_ptr())
        assert not grad[each == -100].any() and grad[each != -100].any(-1).all()
        del grad
    assert len(addresses) == 1


def test_bound(monkeypatch):
    monkeypatch.setenv("DPO_KERNELS_GRADIENT_POOL_MB", "40")
    tensors = [make()[0] for _ in range(4)]
    latest = {t.data_ptr() for t in tensors[2:]}
    del tensors[0], tensors[0], tensors[0], tensors
    assert BYTES < gradient_memory.idle_bytes() <= 40 << 20
    assert {make()[0].data_ptr()} <= latest
    # larger than the bound: never kept, and nothing makes room for it
    before = gradient_memory.idle_bytes()
    large = make((50, 1 << 20))
    del large
    assert gradient_memory.idle_bytes() == before
    monkeypatch.setenv("DPO_KERNELS_GRADIENT_POOL_MB", "0")
    gradient_memory.release()
    one = make()
    del one
    assert gradient_memory.idle_bytes() == 0
    monkeypatch.setenv("DPO_KERNELS_GRADIENT_POOL_MB", "much")
    with pytest.raises(ValueError, match="DPO_KERNELS_GRADIENT_POOL_MB: expected a number"):
        make()


def test_memory_is_shared_by_batches_of_nearly_the_same_size():
    first = make((1000, 4099))
    address = first[0].data_ptr()
    del first
    assert make((990, 4099))[0].data_ptr() == address
    # a small gradient leaves it to the large ones
    assert make((480, 4099))[0].data_ptr() != address


def test_a_storage_shares_and_pickles_but_does_not_grow():
    tensor = make()[0].fill_(2.0)
    for other in (pickle.loads(pickle.dumps(tensor)), copy.deepcopy(tensor)):
        assert torch.equal(tensor, other) and other.data_ptr() != tensor.data_ptr()
    with pytest.raises(RuntimeError, match="not resizable"):
        make()[0].resize_(4, 1 << 20)
    assert make()[0].resize_(2, 5).shape == (2, 5)
    assert tensor.share_memory_().is_shared() and (tensor == 2.0).all()
    # what share_memory_ copied from is free
    gc.collect()
    assert gradient_memory.idle_bytes() > 0


def test_a_gradient_too_large_for_the_machine(monkeypatch):
    logits = torch.zeros(1).expand(2, 1 << 24, 1 << 22)
    for shape in (logits.shape, torch.Size((1 << 40, 1 << 40))):
        with pytest.raises(torch.OutOfMemoryError, match=r"gradient of the logits.*bytes"):
            make(shape)


def test_a_full_address_space_uses_what_is_kept():
    """In a process of its own: the limit stays. Kept memory goes first, then the error comes."""
    script = f"""
import resource, torch
from dpo_kernels.backends import gradient_memory
tensor, _ = gradient_memory.empty(torch.Size((64, 1 << 20)), torch.float32)
del tensor
assert gradient_memory.idle_bytes() >= 256 << 20
used = int(open("/proc/self/statm").read().split()[0]) * {resource.getpagesize()}
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), resource.RLIM_INFINITY))
larger, zeroed = gradient_memory.empty(torch.Size((100, 1 << 20)), torch.float32)
assert zeroed and gradient_memory.idle_bytes() == 0
try:
    gradient_memory.empty(torch.Size((100, 1 << 20)), torch.float32)
except torch.OutOfMemoryError as error:
    print(error)
"""
    environment = os.environ | {"DPO_KERNELS_GRADIENT_POOL_MB": "1024"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "419430400 bytes" in done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_releases_and_leaves_tensors_alone():
    kept, _ = make()
    freed, _ = make()
    kept.numpy().fill(5.0)
    del freed
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            empty = gradient_memory.idle_bytes() == 0
            own, _ = make()
            own.numpy().fill(7.0)
            right = bool((kept.numpy() == 5.0).all())
            del kept
            gc.collect()
            os.write(write, b"1" if empty and right and gradient_memory.idle_bytes() else b"0")
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b"1"
    os.waitpid(child, 0)
    os.close(read)
    assert gradient_memory.idle_bytes() == 0
    assert (kept == 5.0).all()


def test_threads_never_share_memory():
    """Each fills what it gets and finds it unchanged; tensors die on threads that did not make
    them, and inside the garbage collector.
    """
    errors, box = [], []

    def work(number):
        for turn in range(60):
            tensor, _ = make((2, 1 << 20))
            value = 1000.0 * number + turn
            tensor[:, ::4096] = value
            cycle = [tensor[0]]
            cycle.append(cycle)
            if not (tensor[:, ::4096] == value).all():
                errors.append((number, turn))
            box.append(tensor)
            if len(box) > 3:
                box.pop(0)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    box.clear()
    gc.collect()
    assert 0 < gradient_memory.idle_bytes() <= 256 << 20


def test_a_finaliser_may_run_inside_the_pool():
    """As when the garbage collector finds a dead gradient while the lock is held."""
    tensor, _ = make()
    cycle = [tensor]
    cycle.append(cycle)
    dead = weakref.ref(tensor)
    del tensor, cycle
    done = threading.Event()

    def collect_under_lock():
        with gradient_memory._lock:
            gc.collect()
        done.set()

    threading.Thread(target=collect_under_lock, daemon=True).start()
    assert done.wait(20) and dead() is None
    assert gradient_memory.idle_bytes() > 0


def test_memory_is_flat_over_many_calls():
    def mapped() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()

    for turn in range(300):
        make((2 + turn % 5, 1 << 20))
        if turn == 100:
            before = mapped()
    assert mapped() - before < 64 << 20
