"""Times, peak memory, and the CSV rows that carry them with the machine they were taken on."""

from __future__ import annotations

import csv
import ctypes
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import quantiles

import torch

from .environment import environment

COLUMNS = (
    "benchmark",
    "contender",
    "mode",
    "dtype",
    "shape",
    "scored_tokens",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "repetitions",
    "peak_extra_bytes",
    "device",
    "measured_at",
    *("cpu", "cores", "threads", "isa", "memory", "gpu", "system"),
    *("python", "torch", "triton", "dpo_kernels", "commit"),
)


@dataclass(frozen=True)
class Contender:
    """One thing to measure: ``run`` is timed, ``setup`` before each run is not."""

    name: str
    mode: str
    run: Callable[[], object]
    setup: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    median: float
    p20: float
    p80: float
    repetitions: int


def summarize(seconds: list[float]) -> Timing:
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    fifths = quantiles(seconds, n=10, method="inclusive")
    return Timing(fifths[4], fifths[1], fifths[7], len(seconds))


def interleaved(
    contenders: list[Contender],
    device: torch.device | str,
    repetitions: int,
    advance: Callable[[str], object] = lambda note: None,
) -> list[Timing]:
    """Medians of rounds in which everyone runs once: a slow moment of the machine meets all.

    The first round warms up and is not counted. ``advance`` is called after every run.
    """
    seconds: list[list[float]] = [[] for _ in contenders]
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        for repetition in range(repetitions + 1):
            for contender, taken in zip(contenders, seconds, strict=True):
                contender.setup()
                elapsed = time_once(contender.run, device)
                if repetition:
                    taken.append(elapsed)
                advance(f"{contender.name}, {contender.mode}")
    finally:
        if gc_was_on:
            gc.enable()
    return [summarize(taken) for taken in seconds]


def time_once(run: Callable[[], object], device: torch.device | str) -> float:
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3
    start_s = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - start_s
    # freeing large results is not part of what is timed
    del result
    return elapsed


def peak_extra_bytes(run: Callable[[], object], device: torch.device | str) -> int | None:
    """How far ``run`` raises the memory in use above what it is before; None where nothing tells.

    On a GPU what torch allocates; on Linux the resident set of the process, so that memory from
    anywhere counts once it is touched.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
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
    # memory that malloc keeps after a free would hide the next allocation of that size
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def make_row(
    benchmark: str,
    contender: Contender,
    timing: Timing,
    *,
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    scored_tokens: int,
    peak: int | None = None,
) -> dict[str, str]:
    values = {
        "benchmark": benchmark,
        "contender": contender.name,
        "mode": contender.mode,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": "x".join(map(str, shape)),
        "scored_tokens": scored_tokens,
        "median_ms": f"{timing.median * 1e3:.6g}",
        "p20_ms": f"{timing.p20 * 1e3:.6g}",
        "p80_ms": f"{timing.p80 * 1e3:.6g}",
        "repetitions": timing.repetitions,
        "peak_extra_bytes": "" if peak is None else peak,
        "device": device,
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    machine = environment()
    return {column: str(values.get(column, machine.get(column, ""))) for column in COLUMNS}


def write_rows(path: Path, rows: list[dict[str, str]], *, append: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not append or not path.exists() or path.stat().st_size == 0
    with path.open("w" if fresh else "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
