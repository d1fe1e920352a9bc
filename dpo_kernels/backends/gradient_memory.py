"""Memory for large gradients on the CPU: huge pages, kept for the next gradient.

A fresh gradient is bound by its page faults: the kernel zeroes every page on first touch, and a
virtual machine may have to get it from its host first. Writing 256 MiB took 61 ms in fresh huge
pages (86 ms in those of torch.empty) and 9 ms in pages that were there already. So freed gradients
are kept, at most ``DPO_KERNELS_GRADIENT_POOL_MB`` of them (an eighth of the machine's memory
unless set; 0 keeps none), until the next gradient, ``release()`` or a fork. Kept memory is marked
MADV_FREE: under memory pressure the kernel takes it back, and it counts as available.

A tensor's memory goes back when the tensor's storage dies, so views and threads keep it. Such a
storage is torch's own in all but two things: it cannot grow (``resize_`` to more elements raises;
``torch.frombuffer`` offers no allocator), and ``share_memory_`` copies it to shared memory, as it
does with all storages.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import threading
import weakref

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
# below this a mapping costs more than its page faults
_MAP_FROM = 8 << 20
_SUPPORTED = hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MADV_FREE")

# reentrant: the garbage collector may run a finaliser inside of any function here
_lock = threading.RLock()
_idle: list[mmap.mmap] = []  # the latest last


def _bound() -> int:
    """Bytes that may be kept."""
    megabytes = os.environ.get("DPO_KERNELS_GRADIENT_POOL_MB")
    if megabytes is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8
    try:
        return int(megabytes) << 20
    except ValueError:
        raise ValueError(
            f"DPO_KERNELS_GRADIENT_POOL_MB: expected a number, got {megabytes!r}"
        ) from None


def release() -> None:
    """Returns the memory of freed gradients to the system."""
    with _lock:
        _idle.clear()


def idle_bytes() -> int:
    """The size of the memory that is kept for the next gradient."""
    with _lock:
        return sum(map(len, _idle))


def _give_back(memory: mmap.mmap, bound: int) -> None:
    if len(memory) > bound:
        return
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_FREE)
        with _lock:
            _idle.append(memory)
            while sum(map(len, _idle)) > bound:
                del _idle[0]


def _take(size: int) -> mmap.mmap | None:
    """The smallest memory that is kept and fits; much larger memory waits for larger gradients."""
    with _lock:
        fitting = [memory for memory in _idle if size <= len(memory) <= 2 * size]
        best = min(fitting, key=len, default=None)
        if best is not None:
            _idle.remove(best)
        return best


def _map(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # a kernel without huge pages gives small ones
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def empty(shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """Memory for a gradient, and whether it holds zeros already, in pages not yet touched.

    Raises torch.OutOfMemoryError with the size.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < _MAP_FROM or not _SUPPORTED:
        return torch.empty(shape, dtype=dtype), False
    # in steps of at most a quarter, so that batches of nearly the same size share memory: pages
    # that are never touched cost nothing
    step = max(1 << (size.bit_length() - 3), _HUGE_PAGE)
    room = -(-size // step) * step + _HUGE_PAGE
    bound = _bound()
    memory = _take(room)
    fresh = memory is None
    if fresh:
        try:
            memory = _map(room)
        except (OSError, OverflowError, ValueError):
            release()
            try:
                memory = _map(room)
            except (OSError, OverflowError, ValueError) as error:
                raise torch.OutOfMemoryError(
                    f"dpo_kernels: no memory for the gradient of the logits, {list(shape)} of "
                    f"{dtype}, {size} bytes ({size / 2**30:.2f} GiB): {error}"
                ) from error
    # the storage holds the view, the view holds the memory
    view = memoryview(memory)
    weakref.finalize(view, _give_back, memory, bound).atexit = False
    start = torch.frombuffer(view, dtype=torch.uint8, count=1).data_ptr()
    flat = torch.frombuffer(view, dtype=dtype, count=count, offset=-start % _HUGE_PAGE)
    return flat.view(shape), fresh


def _reset_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    # what both processes hold is copied, page by page, when one of them writes to it
    os.register_at_fork(before=release, after_in_child=_reset_lock)
