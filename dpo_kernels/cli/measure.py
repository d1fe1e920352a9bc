"""Times and peak memory of one call, on a CPU and on a GPU."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import torch

from ..backends import gradient_memory


@dataclass
class Timed:
    """One thing to measure: ``run`` is timed, ``setup`` before each run is not.

    ``run`` and ``setup`` take the number of the round: on a GPU, rounds rotate over buffers so that
    no input is still in the cache. ``seconds`` grows by one value a round, and ``call_seconds`` by
    the time that Python took for it (a GPU works on after the call has returned).
    """

    name: str
    run: Callable[[int], object]
    setup: Callable[[int], object] = lambda round: None
    seconds: list[float] = field(default_factory=list)
    call_seconds: list[float] = field(default_factory=list)
    # how long a GPU has to be kept busy before the call, in seconds
    backlog: float = 0.0

    def timing(self) -> Timing:
        call = median(self.call_seconds) if self.call_seconds else None
        return summarize(self.seconds, call)


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    median: float
    p20: float
    p80: float
    repetitions: int
    call: float | None = None


def summarize(seconds: list[float], call: float | None = None) -> Timing:
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], 1, call)
    tenths = quantiles(seconds, n=10, method="inclusive")
    return Timing(median(seconds), tenths[1], tenths[7], len(seconds), call)


def interleaved(
    timed: list[Timed],
    device: torch.device | str,
    repetitions: int,
    advance: Callable[[str], object] = lambda note: None,
) -> None:
    """Rounds in which everyone runs once: a slow moment of the machine meets all.

    The first round warms up and is not counted. ``advance`` is called after every run. What an
    interrupt cuts short keeps the rounds that it has.
    """
    time_one = _time_on_gpu if torch.device(device).type == "cuda" else _time_on_cpu
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        for number in range(repetitions + 1):
            for one in timed:
                one.setup(number)
                seconds, call = time_one(one, number)
                if number:
                    one.seconds.append(seconds)
                    if call is not None:
                        one.call_seconds.append(call)
                advance(one.name)
    finally:
        if gc_was_on:
            gc.enable()


def _time_on_cpu(one: Timed, number: int) -> tuple[float, None]:
    return time_once(lambda: one.run(number), "cpu"), None


def _time_on_gpu(one: Timed, number: int) -> tuple[float, float]:
    """(device time, time of the call).

    The call is queued behind a kernel that spins for longer than Python needs, so that the events
    around it see the device alone. A call that waits for the device shows its waiting in both.
    """
    torch.cuda.synchronize()
    if number == 0:
        # how long Python takes decides how long the queue has to be
        started = time.perf_counter()
        one.run(number)
        torch.cuda.synchronize()
        one.backlog = 2 * (time.perf_counter() - started)
        one.setup(number)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(min(one.backlog, 0.05) * _sleep_cycles_per_second()))
    start.record()
    started = time.perf_counter()
    result = one.run(number)
    call = time.perf_counter() - started
    end.record()
    end.synchronize()
    del result
    one.backlog = 2 * call
    return start.elapsed_time(end) * 1e-3, call


_cycles: list[float] = []


def _sleep_cycles_per_second() -> float:
    if not _cycles:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)
        start.record()
        torch.cuda._sleep(10_000_000)
        end.record()
        end.synchronize()
        _cycles.append(10_000_000 / (start.elapsed_time(end) * 1e-3))
    return _cycles[0]


def time_once(run: Callable[[], object], device: torch.device | str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    result = run()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start_s
    # freeing large results is not part of what is timed
    del result
    return elapsed


def peak_extra_bytes(run: Callable[[], object], device: torch.device | str) -> int | None:
    """How far ``run`` raises the memory in use above what it is before; None where nothing tells.

    On a GPU what torch allocates; on Linux the resident set of the process, so that memory from
    anywhere counts once it is touched.
    """
    # what waits for the collector may be freed in the middle of the call, and hide as much of it
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
    except OSError:
        run()
        return None
    run()
    return max(0, _status_bytes("VmHWM") - before)


def _return_freed_memory() -> None:
    # what our pool of gradients or malloc keeps would hide the next allocation of that size
    gradient_memory.release()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
